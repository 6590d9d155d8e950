"""PaCA layers keep the bits of bitsandbytes' `Linear4bit` layers, nested statistics and all."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from paca_lightning import PaCAConfig, PaCAError, QPaCALinear, apply_paca, disable_paca, merge, paca_layers, unload
from paca_lightning.layers.linear4bit import from_linear4bit, linear4bit_obstacle
from paca_lightning.layers.nf4 import dequantize_rows
from tests.layers.reference import NF4, batch, logits, random_weight, reference, train
from tests.tiny import tiny_llama, tiny_model_directory


def linear4bit(weight: Tensor, blocksize: int = 64, **settings: object) -> nn.Module:
    """A quantized ``Linear4bit`` of a weight."""
    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, **({"quant_type": "nf4"} | settings))
    layer.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        blocksize=blocksize,
        module=layer,
        **{"quant_type": "nf4", "compress_statistics": False} | settings,
    )
    return layer.to("cpu")


def values(layer: nn.Module) -> Tensor:
    return bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def kept_values(layer: nn.Module) -> Tensor:
    packed, scales, dtype = from_linear4bit(layer)
    return dequantize_rows(packed, scales, layer.in_features, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"blocksize": 128}, {"quant_storage": torch.bfloat16}])
def test_linear4bit_keeps_its_values(dtype: torch.dtype, settings: dict[str, object]) -> None:
    layer = linear4bit(random_weight(32, 256, dtype), **settings)
    assert kept_values(layer).dtype == dtype
    assert torch.equal(kept_values(layer), values(layer))


# Runs of 256 scales that end with rows, inside rows, and that are shorter than a row.
@pytest.mark.parametrize("shape", [(50, 64), (300, 448), (17, 3072), (3, 2 * 64 * 256), (5, 64 * 300)])
def test_linear4bit_keeps_its_nested_values(shape: tuple[int, int]) -> None:
    layer = linear4bit(random_weight(*shape, torch.bfloat16), compress_statistics=True)
    assert layer.weight.quant_state.nested
    assert torch.equal(kept_values(layer), values(layer))


def test_nested_scales_stay_small_and_are_split_by_rows() -> None:
    layer = linear4bit(random_weight(64, 4096, torch.bfloat16), compress_statistics=True)
    packed, (*by_row, code, offset), dtype = from_linear4bit(layer)
    assert 8 * sum(tensor.nbytes for tensor in (packed, *by_row)) / (64 * 4096) < 4.27
    rows = slice(37, 51)
    part = dequantize_rows(packed[rows], (*(tensor[rows] for tensor in by_row), code, offset), 4096, dtype)
    assert torch.equal(part, values(layer)[rows])


def test_scales_of_a_linear4bit_made_from_bf16_are_kept_in_bf16() -> None:
    _, (absmax,), _ = from_linear4bit(linear4bit(random_weight(32, 256, torch.bfloat16)))
    assert absmax.dtype == torch.bfloat16


@pytest.mark.parametrize("nested", [False, True])
def test_linear4bit_that_ran_on_this_cpu_keeps_its_values(nested: bool) -> None:
    layer = linear4bit(random_weight(32, 256, torch.bfloat16), compress_statistics=nested).eval()
    before = values(layer)
    with torch.no_grad():
        layer(torch.zeros(1, 256, dtype=torch.bfloat16))  # on CPUs with AVX512-BF16 this packs the weight anew
    torch.testing.assert_close(kept_values(layer), before, rtol=0.01, atol=0)  # and rounds the scales


def test_linear4bit_not_yet_quantized_is_quantized_here() -> None:
    weight = random_weight(32, 256, torch.bfloat16)
    layer = bnb.nn.Linear4bit(256, 32, bias=False, quant_type="nf4")
    layer.weight.data = weight
    assert torch.equal(kept_values(layer), reference(weight)[2].bfloat16())


def test_bits_that_cannot_be_kept_are_told() -> None:
    assert linear4bit_obstacle(linear4bit(random_weight(8, 128))) is None
    crossing = linear4bit_obstacle(linear4bit(random_weight(8, 96)))
    assert crossing is not None
    assert "blocks of 64 weights cross its rows of 96" in crossing
    assert linear4bit_obstacle(linear4bit(random_weight(8, 128), quant_type="fp4")) == (
        "its quantization is fp4, not nf4"
    )


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


@pytest.mark.parametrize("selection", ["quant_error", "output_error"])
def test_quantized_layers_have_lost_what_their_error_would_be_measured_by(selection: str) -> None:
    config = PaCAConfig(r=4, quantize="nf4", selection=selection)
    with pytest.raises(PaCAError, match=rf"{selection}.*'model.layers.0.self_attn.q_proj' is quantized already"):
        apply_paca(with_linear4bit(tiny_llama(), PATHS), config, calibration=[])


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


@pytest.mark.parametrize("ran_before", [False, True])
def test_layers_left_alone_give_right_gradients_after_a_validation(ran_before: bool) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes packs weights anew in eval mode, and its backward misreads them."""
    first, second = (random_weight(64, 64, torch.bfloat16) for _ in range(2))
    model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), linear4bit(second))
    model[0].weight.data.copy_(first)
    inputs = torch.randn(8, 64, dtype=torch.bfloat16)
    if ran_before:
        with torch.no_grad():
            model.eval()(inputs)
    apply_paca(model, PaCAConfig(r=4, target_modules=["0"]))
    with torch.no_grad():
        model.eval()(inputs)
    model.train()(inputs).float().square().mean().backward()
    dense = values(model[1]).to(torch.bfloat16)
    outputs = inputs @ first.t()
    grad = (2 / 512 * (outputs @ dense.t()).float()).bfloat16() @ dense
    expected = grad.t().float() @ inputs[:, model[0].paca_indices].float()
    torch.testing.assert_close(model[0].paca_delta.grad, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
