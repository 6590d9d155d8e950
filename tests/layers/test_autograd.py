"""The tap gives the delta its gradient, saves r channels of the input, and changes nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from paca_lightning.layers.autograd import column_gradient, tapped

INDICES = torch.tensor([1, 3, 4])
SCALING = 0.5


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
@pytest.mark.parametrize("bias", [None, random(4, seed=2)])
def test_gradcheck_against_the_weight_that_the_delta_makes(shape: tuple[int, ...], bias: Tensor | None) -> None:
    # The layer's weight is a plain tensor, brought up to date with the delta outside autograd. The numerical
    # derivative sees that through `delta`; the analytical one has only the tap.
    base = random(4, 6, seed=0)

    def layer(input: Tensor, delta: Tensor) -> Tensor:
        weight = base.index_add(1, INDICES, delta.detach(), alpha=SCALING)
        return tapped(lambda flat: linear(flat, weight, bias), input, delta, INDICES, SCALING)

    input = random(*shape, seed=1).requires_grad_()
    delta = random(4, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(layer, (input, delta))


def test_the_output_is_the_linear_maps_own_tensor() -> None:
    input, weight, delta = random(5, 6, seed=0), random(4, 6, seed=1), torch.zeros(4, 3, requires_grad=True)
    output = linear(input, weight)
    address = output.data_ptr()
    tapped_output = column_gradient(output, input, delta, INDICES, SCALING)
    assert tapped_output.data_ptr() == address
    assert torch.equal(tapped_output, linear(input, weight))


def test_all_that_is_saved_is_r_channels_of_the_input_in_the_layers_own_precision() -> None:
    saved: list[Tensor] = []
    input = random(2, 7, 6, seed=0, dtype=torch.float32)
    weight, delta = random(4, 6, seed=1, dtype=torch.bfloat16), torch.zeros(4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        tapped(lambda flat: linear(flat.bfloat16(), weight), input, delta, INDICES, SCALING)
    (kept,) = saved
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, input.reshape(14, 6)[:, INDICES].bfloat16())


def test_no_tokens_give_a_zero_gradient() -> None:
    weight, delta = random(4, 6, seed=1), torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    output = tapped(lambda flat: linear(flat, weight), torch.zeros(0, 3, 6, dtype=torch.float64), delta, INDICES, 1.0)
    assert output.shape == (0, 3, 4)
    output.sum().backward()
    assert torch.equal(delta.grad, torch.zeros(4, 3, dtype=torch.float64))
