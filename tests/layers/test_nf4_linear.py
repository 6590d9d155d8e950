"""Layers with an NF4 base: the same results as a dense layer of the dequantized weight with the columns in."""

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    PaCALinear,
    QPaCALinear,
    apply_paca,
    disable_paca,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
    unload,
)
from paca_lightning.layers import nf4
from paca_lightning.layers import nf4_autograd as dequantized
from tests.tiny import tiny_llama, tiny_model_directory

NF4 = PaCAConfig(r=4, quantize="nf4")


def nf4_layer(
    inputs: int = 128,
    outputs: int = 24,
    *,
    r: int = 4,
    alpha: float | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[QPaCALinear, Tensor]:
    """A layer with a random delta, and the unquantized weight it was made from."""
    torch.manual_seed(0)
    layer = PaCALinear(inputs, outputs, bias, dtype=dtype, r=r, alpha=alpha)
    weight = layer.weight.detach().clone()
    QPaCALinear.quantize(layer)
    with torch.no_grad():
        layer.paca_delta.normal_(std=0.1)
    return layer, weight


def nf4_values(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    packed, absmax = nf4.quantize_rows(weight)
    return nf4.dequantize_rows(packed, (absmax,), weight.shape[1], dtype)


def effective(layer: QPaCALinear, weight: Tensor, delta: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a layer stands for, put together by hand."""
    columns = weight[:, layer.paca_indices].to(delta.dtype) + layer.scaling * delta
    return nf4_values(weight, dtype).index_copy(1, layer.paca_indices, columns.to(dtype))


def batch(length: int = 12, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


@pytest.mark.parametrize("shape", [(128,), (5, 128), (2, 5, 128)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_equals_a_dense_layer(shape: tuple[int, ...], bias: bool, alpha: float | None) -> None:
    layer, weight = nf4_layer(bias=bias, alpha=alpha)
    x, delta = torch.randn(shape, requires_grad=True), layer.paca_delta.detach().clone().requires_grad_()
    expected = F.linear(x, effective(layer, weight, delta), layer.bias)
    output = layer(x)
    torch.testing.assert_close(output, expected)
    seed = torch.randn_like(output)
    found = torch.autograd.grad(output, (x, layer.paca_delta), seed)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, delta), seed))


@pytest.mark.parametrize("columns", [100, 40])
def test_rows_that_are_no_whole_blocks(columns: int) -> None:
    layer, weight = nf4_layer(columns)
    x = torch.randn(3, columns, requires_grad=True)
    expected = effective(layer, weight, layer.paca_delta.detach())
    torch.testing.assert_close(layer(x), F.linear(x, expected, layer.bias))
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], expected.sum(0).expand(3, -1))


def test_gradcheck() -> None:
    layer, _ = nf4_layer(64, 6, r=3, alpha=2.0, dtype=torch.float64)
    assert layer.paca_delta.dtype == torch.float64
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.paca_delta))


def test_trains_as_a_dense_layer_does() -> None:
    layer, weight = nf4_layer()
    delta = nn.Parameter(layer.paca_delta.detach().clone())
    optimizers = [torch.optim.AdamW([parameter], lr=1e-2) for parameter in (layer.paca_delta, delta)]
    for _ in range(8):
        x, target = torch.randn(16, 128), torch.randn(16, 24)
        losses = (
            F.mse_loss(layer(x), target),
            F.mse_loss(F.linear(x, effective(layer, weight, delta), layer.bias), target),
        )
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(layer.paca_delta, delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer, weight = nf4_layer(dtype=dtype)
    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    expected = F.linear(x, effective(layer, weight, layer.paca_delta.detach(), dtype), layer.bias)
    assert torch.equal(layer(x), expected)
    grads = torch.autograd.grad(layer(x).sum(), (x, layer.paca_delta))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]


def test_autocast() -> None:
    layer, weight = nf4_layer()
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    expected = effective(layer, weight, layer.paca_delta.detach(), torch.bfloat16)
    assert torch.equal(output, F.linear(x.bfloat16(), expected, layer.bias.bfloat16()))
    output.sum().backward()
    assert (x.grad.dtype, layer.paca_delta.grad.dtype) == (torch.float32, torch.float32)


def test_a_bias_may_be_trained_too() -> None:
    layer, _ = nf4_layer()
    layer.bias.requires_grad_()
    layer(torch.randn(2, 5, 128)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 10.0))


def test_keeps_only_the_selected_inputs() -> None:
    layer, _ = nf4_layer()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(7, 128, requires_grad=True))
    assert kept == [(7, 4)]


@pytest.mark.parametrize(("needs_grad", "times"), [(True, 2), (False, 1)])
def test_dequantizes_again_only_for_the_gradient_of_its_input(
    needs_grad: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = nf4_layer()
    calls = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return nf4.dequantize_rows(*args, **options)

    monkeypatch.setattr(dequantized, "dequantize_rows", counted)
    layer(torch.randn(3, 128, requires_grad=needs_grad)).sum().backward()
    assert len(calls) == times


def test_compiles_without_graph_breaks() -> None:
    layer, _ = nf4_layer()
    x = torch.randn(2, 5, 128, requires_grad=True)
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        output = forward(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, layer.paca_delta))))
    torch.testing.assert_close(results[0], results[1])


def test_compiled_keeps_no_dequantized_weight() -> None:
    """The compiler would take the backward's dequantization for the forward's, and keep its result in between."""
    layer, _ = nf4_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        compiled(torch.randn(5, 128, requires_grad=True))
    assert kept
    assert (layer.out_features, layer.in_features) not in {tuple(shape) for shape in kept}


def test_checkpointing_changes_nothing() -> None:
    layer, _ = nf4_layer()
    x = torch.randn(2, 5, 128, requires_grad=True)
    results = []
    for forward in (layer, functools.partial(checkpoint, layer, use_reentrant=False)):
        output = forward(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, layer.paca_delta))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_construction_needs_no_weights() -> None:
    layer = QPaCALinear(100, 24, device="meta", r=3, indices=torch.tensor([1, 5, 99]))
    assert layer.packed.shape == (24, 64)
    assert layer.absmax.shape == (24, 2)
    assert layer.paca_base_columns.shape == layer.paca_delta.shape == (24, 3)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer.to_empty(device="cpu").paca_indices.tolist() == [1, 5, 99]


def test_constructed_like_a_linear_layer() -> None:
    layer = QPaCALinear(64, 8, bias=False, dtype=torch.bfloat16, r=2, alpha=4)
    assert layer.bias is None
    assert layer.scaling == 2
    assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).shape == (3, 8)
    assert repr(layer) == "QPaCALinear(in_features=64, out_features=8, bias=False, r=2, scaling=2)"
    with pytest.raises(PaCAError, match="r=65 must lie between 1 and in_features=64"):
        QPaCALinear(64, 8, r=65)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_casting_a_model_leaves_the_quantized_weight_alone(cast: Any) -> None:
    layer, _ = nf4_layer(dtype=torch.bfloat16)
    before = layer.dequantize(torch.float32)
    cast(layer)
    assert (layer.packed.dtype, layer.absmax.dtype) == (torch.uint8, torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert layer.paca_delta.dtype == torch.promote_types(torch.float32, layer.bias.dtype)
    bias = layer.bias
    layer.release(trained=True)
    assert layer.weight.dtype == bias.dtype


def test_copies_and_state_dicts_are_exact() -> None:
    layer, _ = nf4_layer()
    other = QPaCALinear(128, 24, r=4)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128)
    for twin in (copy.deepcopy(layer), other):
        assert torch.equal(twin(x), layer(x))
        assert twin.paca_delta is not layer.paca_delta


def test_another_delta_loads_but_other_columns_do_not() -> None:
    layer, weight = nf4_layer()
    state = {"paca_delta": torch.ones(24, 4), "paca_indices": layer.paca_indices.clone()}
    layer.load_state_dict(state, strict=False)
    expected = effective(layer, weight, torch.ones(24, 4))
    torch.testing.assert_close(layer.dequantize(), expected)
    state["paca_indices"] = torch.arange(4)
    with pytest.raises(PaCAError, match="unquantized weight, which is gone"):
        nn.Sequential(layer).load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=False)
    with pytest.raises(PaCAError, match="unquantized weight, which is gone"):
        layer.move_to_columns(torch.arange(4))


# Whole models.


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


def train(model: nn.Module, steps: int = 3) -> Tensor:
    """A few steps; returns the logits after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return logits(model)


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


# Which columns.


def test_quant_error_takes_the_columns_that_quantization_hurts_most() -> None:
    model = tiny_llama()
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", selection="quant_error"))
    layer = model.model.layers[0].mlp.down_proj
    errors = (weight - nf4_values(weight)).square().sum(0)
    assert set(layer.paca_indices.tolist()) == set(errors.topk(4).indices.tolist())


def test_quant_error_is_weighted_by_activations() -> None:
    model = tiny_llama().eval()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    seen: list[Tensor] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    logits(model)
    hook.remove()
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", selection="quant_error"), calibration=[batch()])
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


# Models that are quantized already.


def with_linear4bit(model: nn.Module, paths: Iterable[str], **settings: Any) -> nn.Module:
    for path in paths:
        dense = model.get_submodule(path)
        layer = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, dense.bias is not None, **({"quant_type": "nf4"} | settings)
        )
        layer.load_state_dict(dense.state_dict())
        model.set_submodule(path, layer.to("cpu"))
    return model


PATHS = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("selection", ["random", "weight_norm"])
def test_linear4bit_layers_keep_their_bits(nested: bool, selection: str) -> None:
    model = with_linear4bit(tiny_llama(), PATHS, compress_statistics=nested)
    before = logits(model)
    apply_paca(model, PaCAConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], selection=selection))
    assert all(isinstance(layer, QPaCALinear) for _, layer in paca_layers(model))
    assert torch.equal(logits(model), before)
    train(model)
    with disable_paca(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(unload(model)), before)


def test_columns_of_a_linear4bit_may_move() -> None:
    model = with_linear4bit(tiny_llama(), PATHS)
    before = logits(model)
    config = PaCAConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], selection="activation_norm")
    apply_paca(model, config, calibration=[batch()])
    assert torch.equal(logits(model), before)


def test_linear4bit_layers_that_cannot_be_kept_are_named() -> None:
    targets = PaCAConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(PaCAError, match=r"layers.0.self_attn.q_proj.*its quantization is fp4"):
        apply_paca(with_linear4bit(tiny_llama(), PATHS, quant_type="fp4"), targets)
    crossing = with_linear4bit(tiny_llama(), ["model.layers.0.mlp.down_proj"])  # 96 inputs
    with pytest.raises(PaCAError, match=r"down_proj.*blocks of 64 weights cross its rows of 96"):
        apply_paca(crossing, PaCAConfig(r=4, target_modules=["down_proj"]))
    report = apply_paca(crossing, PaCAConfig(r=4))
    assert "cross its rows" in report.skipped["model.layers.0.mlp.down_proj"]
    with pytest.raises(PaCAError, match=r"'model.layers.0.self_attn.q_proj' is quantized already"):
        apply_paca(with_linear4bit(tiny_llama(), PATHS), PaCAConfig(r=4, quantize="nf4", selection="quant_error"))


@pytest.mark.parametrize("nested", [False, True])
def test_models_that_transformers_quantized(tmp_path: Path, nested: bool) -> None:
    directory = tiny_model_directory(tmp_path / "model", intermediate_size=128)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    ).train()
    before = logits(model)
    report = apply_paca(model, PaCAConfig(r=4))
    assert {type(layer) for _, layer in paca_layers(model)} == {QPaCALinear}
    assert len(report.layers) == 14
    assert torch.equal(logits(model), before)
    train(model)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_beside_lightnings_bitsandbytes_precision(mode: str) -> None:
    # Without a GPU the plugin replaces the layers and leaves the quantizing to us.
    model, plugin = tiny_llama(), BitsandbytesPrecision(mode, dtype=torch.float32, ignore_modules={"lm_head"})
    plugin.convert_module(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    apply_paca(model, NF4)
    plugin.convert_module(model)  # Lightning does so once more
    assert {type(layer) for _, layer in paca_layers(model)} == {QPaCALinear}
    twin = tiny_llama()
    apply_paca(twin, NF4)
    assert torch.equal(logits(model), logits(twin))
    merge(model).load_state_dict(tiny_llama().state_dict())
    assert torch.equal(logits(model), logits(tiny_llama()))


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
