"""RMSNorms that are trained along: bitwise what autograd computes, with their input kept alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from paca_lightning.layers.along import end_along, train_along
from tests.layers.test_saved_tensors import saved_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def norm_and_twin(size: int = 48, dtype: torch.dtype = torch.bfloat16, kind: Any = LlamaRMSNorm) -> Any:
    """A norm that is trained along, and one whose weight autograd differentiates."""
    twin = kind(size).to(dtype)
    nn.init.normal_(twin.weight, generator=torch.Generator().manual_seed(0))
    norm = copy.deepcopy(twin)
    train_along(norm, ["weight"])
    return norm, twin


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)


def gradients(module: nn.Module, input: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradient of the weight in the precision of the module."""
    input = input.clone().requires_grad_()
    output = module(input)
    output.backward(random(*output.shape).to(output.dtype))
    return [output.detach(), input.grad, module.weight.grad.float()]


def all_equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(48,), (3, 7, 48), (2, 5, 3, 48)], ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_bitwise_those_of_autograd(
    dtype: torch.dtype, weight: torch.dtype, shape: tuple[int, ...]
) -> None:
    norm, twin = norm_and_twin(dtype=weight)
    input = random(*shape, dtype=dtype)
    assert all_equal(gradients(norm, input), gradients(twin, input))


def test_it_keeps_its_input_and_one_number_for_each_row() -> None:
    norm, _ = norm_and_twin()
    input = random(2, 5, 48).requires_grad_()
    kept = saved_tensors(lambda: norm(input)).values()
    of_rows = {(tensor.dtype, tuple(tensor.shape)) for tensor in kept if tensor.dim() == 3}
    assert of_rows == {(torch.bfloat16, (2, 5, 48)), (torch.float32, (2, 5, 1))}
    assert any(tensor.data_ptr() == input.data_ptr() for tensor in kept)  # no copy of it


@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_autocast_and_checkpointing_change_nothing(input_needs_grad: bool) -> None:
    norm, twin = norm_and_twin(dtype=torch.float32)
    found = []
    for module in (norm, twin):
        for dtype in (torch.float32, torch.bfloat16):
            input = random(4, 48, dtype=dtype).requires_grad_(input_needs_grad)
            with torch.autocast("cpu", torch.bfloat16):
                output = checkpoint(module, input, use_reentrant=False)
                output.float().square().sum().backward()
            found.append([output.detach(), module.weight.grad.clone(), input.grad])
    ours, theirs = found[:2], found[2:]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[2] is other[2] is None or torch.equal(one[2], other[2])


def test_transforms_and_second_derivatives() -> None:
    norm, twin = norm_and_twin(dtype=torch.float64)
    input = random(3, 48, dtype=torch.float64)

    def loss(module: nn.Module, weight: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, (input,)).square().sum()

    weight = twin.weight.detach()
    assert torch.equal(grad(lambda w: loss(norm, w))(weight), grad(lambda w: loss(twin, w))(weight))
    (first,) = torch.autograd.grad(loss(norm, norm.weight), [norm.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # refused, as layers refuse it
        first.sum().backward()


def test_copies_compute_with_their_own_weight_and_all_goes_back() -> None:
    norm, twin = norm_and_twin()
    other = copy.deepcopy(norm)
    nn.init.ones_(other.weight)
    input = random(3, 48)
    assert torch.equal(norm(input), twin(input))
    assert not torch.equal(other(input.requires_grad_()), twin(input))
    end_along(norm)
    assert "forward" not in vars(norm)
    assert torch.equal(norm(input), twin(input))


def test_other_norms_and_replaced_forwards_stay_as_they_are() -> None:
    gemma, twin = norm_and_twin(kind=GemmaRMSNorm)
    assert "forward" not in vars(gemma)
    assert all_equal(gradients(gemma, random(3, 48)), gradients(twin, random(3, 48)))

    norm = LlamaRMSNorm(48)
    norm.forward = kernel = lambda hidden_states: hidden_states * norm.weight
    train_along(norm, ["weight"])
    assert norm.forward is kernel
    end_along(norm)
    assert norm.forward is kernel
