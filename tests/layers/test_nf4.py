"""Row-blocked NF4 against a plain torch reference, and the bits of bitsandbytes' layers."""

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAError
from paca_lightning.layers import nf4
from tests.distributed_launch import launch

# QLoRA (arXiv 2305.14314), appendix E.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


def reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight, exact scales and dequantized weight, for rows of whole blocks."""
    blocks = weight.float().view(len(weight), -1, 64)
    absmax = blocks.abs().amax(-1)
    codes = ((blocks / absmax[..., None])[..., None] - LEVELS).abs().argmin(-1)
    restored = LEVELS[codes] * absmax.bfloat16().float()[..., None]
    codes = codes.view(len(weight), -1)
    return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), absmax, restored.view_as(weight)


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bits_are_those_of_the_reference(dtype: torch.dtype) -> None:
    weight = random_weight(24, 192, dtype)
    packed, absmax = nf4.quantize_rows(weight)
    expected_packed, expected_absmax, expected = reference(weight)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax.bfloat16())
    assert torch.equal(nf4.dequantize_rows(packed, (absmax,), 192, torch.float32), expected)
    assert torch.equal(nf4.dequantize_rows(packed, (absmax,), 192, torch.bfloat16), expected.bfloat16())
    assert torch.equal(nf4.dequantize_rows(packed, (absmax,), 192, torch.float64), expected.double())


def test_a_weight_takes_four_and_a_quarter_bits() -> None:
    packed, absmax = nf4.quantize_rows(random_weight(16, 512, torch.bfloat16))
    assert 8 * (packed.nbytes + absmax.nbytes) / (16 * 512) == 4.25


def test_scales_of_bf16_weights_lose_nothing() -> None:
    weight = random_weight(16, 512, torch.bfloat16)
    _, absmax = nf4.quantize_rows(weight)
    assert torch.equal(absmax.float(), weight.float().view(16, 8, 64).abs().amax(-1))


def test_bf16_scales_of_fp32_weights_add_less_than_a_thousandth_to_the_error() -> None:
    weight = random_weight(256, 1024)
    packed, absmax = nf4.quantize_rows(weight)
    exact = (weight.view(256, 16, 64).abs().amax(-1),)
    error, least = (
        (nf4.dequantize_rows(packed, scales, 1024, torch.float32) - weight).norm() for scales in ((absmax,), exact)
    )
    assert least < error < 1.001 * least


def test_rows_are_quantized_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(10, 128)
    whole = nf4.quantize_rows(weight)
    split = [nf4.quantize_rows(rows) for rows in weight.split([3, 0, 6, 1])]
    monkeypatch.setattr(nf4, "CHUNK", 300)
    chunked = nf4.quantize_rows(weight)
    for index in (0, 1):
        assert torch.equal(whole[index], torch.cat([part[index] for part in split]))
        assert torch.equal(whole[index], chunked[index])


@pytest.mark.parametrize("columns", [1, 63, 65, 100])
def test_rows_of_any_length_are_padded_to_whole_blocks(columns: int) -> None:
    weight = random_weight(8, columns)
    packed, absmax = nf4.quantize_rows(weight)
    assert (packed.shape, absmax.shape) == nf4.packed_shapes(8, columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % 64))
    restored = nf4.dequantize_rows(packed, (absmax,), columns, torch.float32)
    assert torch.equal(restored, reference(padded)[2][:, :columns])


def test_a_block_of_zeros_stays_zero() -> None:
    weight = random_weight(2, 128)
    weight[0, :64] = 0
    packed, absmax = nf4.quantize_rows(weight)
    assert torch.equal(nf4.dequantize_rows(packed, (absmax,), 128, torch.float32)[0, :64], torch.zeros(64))


def test_on_meta_only_the_shapes_are_made() -> None:
    packed, absmax = nf4.quantize_rows(torch.empty(8, 100, device="meta"))
    assert packed.is_meta
    assert (packed.shape, absmax.shape) == nf4.packed_shapes(8, 100)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_weight_is_refused_by_name(value: float) -> None:
    weight = random_weight(4, 64, torch.bfloat16)
    weight[2, 3] = value
    with pytest.raises(PaCAError, match=r"'layers.0.q_proj' holds NaN or infinite"):
        nf4.quantize_rows(weight, "layers.0.q_proj")


def test_squared_errors_add_up_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(12, 128)
    expected = (weight - reference(weight)[2]).square().sum(0)
    torch.testing.assert_close(nf4.squared_errors(weight), expected)
    torch.testing.assert_close(sum(nf4.squared_errors(rows) for rows in weight.split(5)), expected)
    monkeypatch.setattr(nf4, "CHUNK", 300)
    torch.testing.assert_close(nf4.squared_errors(weight), expected)


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
    packed, scales, dtype = nf4.from_linear4bit(layer)
    return nf4.dequantize_rows(packed, scales, layer.in_features, dtype)


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
    packed, (*by_row, code, offset), dtype = nf4.from_linear4bit(layer)
    assert 8 * sum(tensor.nbytes for tensor in (packed, *by_row)) / (64 * 4096) < 4.27
    rows = slice(37, 51)
    part = nf4.dequantize_rows(packed[rows], (*(tensor[rows] for tensor in by_row), code, offset), 4096, dtype)
    assert torch.equal(part, values(layer)[rows])


def test_scales_of_a_linear4bit_made_from_bf16_are_kept_in_bf16() -> None:
    _, (absmax,), _ = nf4.from_linear4bit(linear4bit(random_weight(32, 256, torch.bfloat16)))
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
    assert nf4.linear4bit_obstacle(linear4bit(random_weight(8, 128))) is None
    crossing = nf4.linear4bit_obstacle(linear4bit(random_weight(8, 96)))
    assert crossing is not None
    assert "blocks of 64 weights cross its rows of 96" in crossing
    assert nf4.linear4bit_obstacle(linear4bit(random_weight(8, 128), quant_type="fp4")) == (
        "its quantization is fp4, not nf4"
    )


@pytest.mark.parametrize("version", ["0.46.1", "0.45.0.dev0"])
def test_a_bitsandbytes_without_operators_for_gaudi_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", version)
    for _ in range(2):
        with pytest.raises(PaCAError, match=rf"bitsandbytes {version} has no NF4 .*'bitsandbytes>=0.47,<=0.49.2'"):
            nf4.check_hpu_backend()


def test_a_newer_bitsandbytes_than_recommended_for_gaudi_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", "0.51.0")
    with pytest.warns(UserWarning, match=r"bitsandbytes 0.51.0 is newer than is recommended"):
        nf4.check_hpu_backend()
    nf4.check_hpu_backend()  # a second warning would be an error here


@pytest.mark.parametrize(("version", "rank"), [("0.47.0", "0"), ("0.49.2", "0"), ("0.52.0", "1")])
def test_other_versions_and_other_ranks_are_silent(version: str, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", version)
    monkeypatch.setenv("LOCAL_RANK", rank)
    nf4.check_hpu_backend()  # a warning would be an error here


def weights_restored(default: torch.dtype) -> Tensor:
    torch.set_default_dtype(default)
    packed, absmax = nf4.quantize_rows(torch.linspace(-1, 1, 256, dtype=torch.float32).view(2, 128))
    return nf4.dequantize_rows(packed, (absmax,), 128, torch.float32)


def test_levels_do_not_depend_on_the_default_dtype_of_their_first_use() -> None:
    """Lightning's bf16-true makes bf16 the default, and bitsandbytes keeps the levels that it made first."""
    wide, narrow = (launch(weights_restored, 1, default)[0] for default in (torch.float32, torch.bfloat16))
    assert torch.equal(wide, narrow)
