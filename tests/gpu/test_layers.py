"""Parity of every layer with a plain layer of the same weight, on the GPU, in all precisions."""

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAConfig, QPaCALinear, apply_paca
from tests.layers.reference import IN, INDICES, KINDS, R, column_gradient_of, loss_of, pair_of, relative

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference over largest value. A GPU sums in another order than the reference, in the same precision."""
SHAPES = {"2-D": (7, IN), "3-D": (2, 5, IN)}


def cases() -> Iterator[object]:
    """Kind, dtype, bias, shape and autocast. Conv1D always has a bias; mixed precision keeps its weights in fp32."""
    precisions = [(dtype, None) for dtype in TOLERANCE] + [(torch.float32, dtype) for dtype in TOLERANCE][1:]
    for kind, (dtype, autocast), bias, shape in itertools.product(KINDS, precisions, (True, False), SHAPES):
        if bias or kind != "transposed":
            words = (kind, dtype, f"autocast {autocast}" if autocast else "", "bias" if bias else "no bias", shape)
            name = "-".join(str(word).replace("torch.", "") for word in words if word)
            yield pytest.param(kind, dtype, bias, SHAPES[shape], autocast, id=name)


@pytest.mark.parametrize(("kind", "dtype", "bias", "shape", "autocast"), list(cases()))
def test_parity_with_a_masked_dense_gradient(
    device: str, kind: str, dtype: torch.dtype, bias: bool, shape: tuple[int, ...], autocast: torch.dtype | None
) -> None:
    layer, twin = (module.to(device) for module in pair_of(kind, dtype, bias))
    results = []
    for module in (layer, twin):
        torch.manual_seed(1)
        input = torch.randn(shape, dtype=dtype).to(device).requires_grad_()
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            output = module(input)
        loss_of(output).backward()
        results.append((output, input.grad))
    (output, input_grad), (expected_output, expected_input_grad) = results

    tolerance = TOLERANCE[autocast or dtype]
    assert output.dtype == expected_output.dtype
    assert relative(output, expected_output) <= tolerance
    assert relative(input_grad, expected_input_grad) <= tolerance
    assert layer.paca_delta.grad.dtype == torch.float32
    assert relative(layer.paca_delta.grad, column_gradient_of(twin)) <= tolerance


@pytest.mark.cuda_only  # a CPU has no product of bf16 with fp32 output
def test_the_deltas_gradient_is_not_rounded_to_16_bits(device: str) -> None:
    """One GEMM with fp32 output: nearer to fp64 than any bf16 number can be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False)).bfloat16().to(device)
    apply_paca(model, PaCAConfig(r=8))
    input = torch.randn(4096, 256, device=device).bfloat16()
    grad_output = torch.randn(4096, 64, device=device).bfloat16()
    model(input).backward(grad_output)
    exact = grad_output.double().T @ input.double()[:, model[0].paca_indices]
    assert relative(model[0].paca_delta.grad, exact) <= 1e-4  # bf16 has steps of 4e-3


def test_nf4_equals_its_dequantized_twin(device: str) -> None:
    """bitsandbytes' own operators on this device quantize and dequantize as those on the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 128)).bfloat16()
    on_cpu = copy.deepcopy(model)
    model = model.to(device)
    for each in (model, on_cpu):
        apply_paca(each, PaCAConfig(r=R, quantize="nf4"))
    for ours, theirs in zip(model, on_cpu, strict=True):
        assert isinstance(ours, QPaCALinear)
        assert isinstance(theirs, QPaCALinear)
        assert torch.equal(ours.dequantize().cpu(), theirs.dequantize())
    dense = nn.Sequential(*(as_dense(layer) for layer in model))
    input = torch.randn(9, 256, device=device).bfloat16().requires_grad_()
    outputs = [each(input) for each in (model, dense)]
    assert relative(*outputs) <= TOLERANCE[torch.bfloat16]
    gradients = [torch.autograd.grad(output.float().square().sum(), input)[0] for output in outputs]
    assert relative(*gradients) <= TOLERANCE[torch.bfloat16]


def as_dense(layer: QPaCALinear) -> nn.Linear:
    weight: Tensor = layer.dequantize()
    dense = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        dense.weight.copy_(weight)
        dense.bias.copy_(layer.bias)
    return dense


@pytest.mark.parametrize("nested", [False, True])
def test_a_linear4bit_keeps_its_values(device: str, nested: bool) -> None:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(IN * 8, 64, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=nested)
    model = nn.Sequential(layer.to(device))
    input = torch.randn(5, IN * 8, device=device).bfloat16()
    with torch.no_grad():
        before = model(input)
        apply_paca(model, PaCAConfig(r=R), indices={"0": INDICES})
        assert isinstance(model[0], QPaCALinear)
        assert relative(model(input), before) <= TOLERANCE[torch.bfloat16]
