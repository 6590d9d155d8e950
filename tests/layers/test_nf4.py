"""The NF4 codec against a plain torch reference."""

import pytest
import torch

from paca_lightning import PaCAError
from paca_lightning.layers import nf4
from tests.layers.reference import random_weight, reference


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
