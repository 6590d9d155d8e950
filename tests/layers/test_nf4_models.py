"""Whole models with an NF4 base: conversion, training, merging, saving, choice of columns."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    QPaCALinear,
    apply_paca,
    disable_paca,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
    unload,
)
from tests.layers.reference import NF4, batch, effective, logits, nf4_values, train
from tests.tiny import tiny_llama


def test_conversion_quantizes_the_targets() -> None:
    model = tiny_llama().bfloat16()
    weights = {path: module.weight.clone() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report = apply_paca(model, NF4)
    layers = dict(paca_layers(model))
    assert len(layers) == 14
    assert all(isinstance(layer, QPaCALinear) for layer in layers.values())
    assert report.total_parameters == parameters + report.trainable_parameters
    for path, layer in layers.items():
        torch.testing.assert_close(
            layer.dequantize(), effective(layer, weights[path], layer.paca_delta, torch.bfloat16)
        )
        assert torch.equal(layer.paca_base_columns, weights[path][:, layer.paca_indices])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{path}.paca_delta" for path in layers
    ]


def test_conversion_is_idempotent_and_takes_indices() -> None:
    model = tiny_llama()
    path = "model.layers.0.self_attn.q_proj"
    apply_paca(model, NF4, indices={path: torch.tensor([0, 9, 10, 63])})
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    apply_paca(model, NF4)
    assert model.get_submodule(path).paca_indices.tolist() == [0, 9, 10, 63]
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def test_meta_models_convert() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    apply_paca(model, NF4)
    real = tiny_llama()
    apply_paca(real, NF4)
    shapes = [{name: (p.shape, p.dtype) for name, p in one.named_parameters()} for one in (model, real)]
    assert shapes[0] == shapes[1]
    for (_, layer), (_, twin) in zip(paca_layers(model), paca_layers(real), strict=True):
        assert torch.equal(layer.paca_indices, twin.paca_indices)


def test_disabled_it_is_the_plain_nf4_base() -> None:
    plain = tiny_llama()
    with torch.no_grad():
        for path, module in plain.named_modules():
            if isinstance(module, nn.Linear) and path != "lm_head":
                module.weight.copy_(nf4_values(module.weight))
    model = tiny_llama()
    apply_paca(model, NF4)
    trained = train(model)
    with disable_paca(model):
        torch.testing.assert_close(logits(model), logits(plain))
    assert torch.equal(logits(model), trained)


def test_merge_and_unload_give_dense_layers_with_exact_columns() -> None:
    model = tiny_llama()
    weights = {path: module.weight.clone() for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    apply_paca(model, NF4)
    before, after = logits(model), train(model)
    expected = {path: (layer.paca_indices, layer.paca_delta.detach().clone()) for path, layer in paca_layers(model)}
    merged, unloaded = merge(copy.deepcopy(model)), unload(model)
    assert {type(m) for _, m in merged.named_modules() if "proj" in _} == {nn.Linear}
    torch.testing.assert_close(logits(merged), after)
    torch.testing.assert_close(logits(unloaded), before)
    for path, (indices, delta) in expected.items():
        columns = weights[path][:, indices]
        assert torch.equal(merged.get_submodule(path).weight[:, indices], columns + delta)
        assert torch.equal(unloaded.get_submodule(path).weight[:, indices], columns)
        rest = [j for j in range(columns.shape[1]) if j not in indices]
        assert torch.equal(merged.get_submodule(path).weight[:, rest], nf4_values(weights[path])[:, rest])


def test_transposed_layers_are_quantized_and_released_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=384, n_positions=32)).eval()
    path = "transformer.h.0.attn.c_attn"
    weight = model.get_submodule(path).weight.detach().t().clone()
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", selection="quant_error"))
    layer = model.get_submodule(path)
    torch.testing.assert_close(layer.dequantize(), effective(layer, weight, layer.paca_delta.detach()))
    before = logits(model)
    assert type(unload(model).get_submodule(path)).__name__ == "Conv1D"
    torch.testing.assert_close(logits(model), before)


def test_an_adapter_of_an_nf4_model_survives_saving(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", selection="weight_norm"))
    trained = train(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), trained)


def test_a_damaged_weight_is_refused_by_name() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(PaCAError, match=r"'model.layers.1.mlp.up_proj' holds NaN"):
        apply_paca(model, NF4)


def test_quant_error_takes_the_columns_that_quantization_hurts_most() -> None:
    model = tiny_llama()
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", selection="quant_error"))
    layer = model.model.layers[0].mlp.down_proj
    errors = (weight - nf4_values(weight)).square().sum(0)
    assert set(layer.paca_indices.tolist()) == set(errors.topk(4).indices.tolist())


@pytest.mark.parametrize("selection", ["quant_error", "output_error"])
def test_errors_are_weighed_by_activations(selection: str) -> None:
    model = tiny_llama().eval()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    seen: list[Tensor] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    logits(model)
    hook.remove()
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", selection=selection), calibration=[batch()])
    layer = model.model.layers[0].self_attn.q_proj
    scores = (weight - nf4_values(weight)).square().sum(0) * seen[0].square().sum((0, 1))
    assert set(layer.paca_indices.tolist()) == set(scores.detach().topk(4).indices.tolist())
    assert torch.equal(layer.paca_base_columns, weight[:, layer.paca_indices])


@pytest.mark.parametrize("selection", ["activation_norm", "gradient_norm"])
def test_columns_chosen_by_data_start_from_the_unquantized_weight(selection: str) -> None:
    model, dense = tiny_llama(), tiny_llama()
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", selection=selection), calibration=[batch()])
    apply_paca(dense, PaCAConfig(r=4, selection=selection), calibration=[batch()])
    for (_, layer), (_, twin) in zip(paca_layers(model), paca_layers(dense), strict=True):
        assert isinstance(layer, QPaCALinear)
        assert torch.equal(layer.paca_indices, twin.paca_indices)
        assert torch.equal(layer.paca_base_columns, twin.paca_base_columns)


def test_models_that_look_at_a_weight_find_it() -> None:
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).requires_grad_(False)
    apply_paca(encoder, PaCAConfig(r=4, target_modules=["linear1", "linear2"], quantize="nf4"))
    x = torch.randn(2, 5, 64)
    trained = encoder.train().linear1(x)
    assert torch.allclose(trained, nn.functional.linear(x, encoder.linear1.weight, encoder.linear1.bias), atol=1e-5)
    encoder.eval()
    with torch.no_grad():
        assert encoder(x).shape == x.shape  # its fast path reads the weights

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
    )
    apply_paca(t5, PaCAConfig(r=4, quantize="nf4"))
    ids = torch.arange(8).view(1, 8)
    t5(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.paca_delta.grad is not None for _, layer in paca_layers(t5))
