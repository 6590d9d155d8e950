"""PaCA layers under torch.func, forward-mode differentiation, tracing and second derivatives: right, or refused."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

from paca_lightning import PaCAConfig, PaCAError, apply_paca
from paca_lightning.layers.base import PaCALayer
from tests.layers.reference import ALPHA, IN, INDICES, KINDS, OUT, R, pair_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def weight_of(layer: PaCALayer, delta: Tensor) -> Tensor:
    """The weight that a delta makes, shape (out_features, in_features), in plain torch."""
    weight = layer.weight.detach()
    weight = weight.t() if type(layer).__name__ == "PaCAConv1D" else weight
    return weight.index_copy(1, INDICES, layer.paca_base_columns + ALPHA / R * delta)


def expected(layer: PaCALayer, delta: Tensor, input: Tensor) -> Tensor:
    return F.linear(input, weight_of(layer, delta), layer.bias)


def with_delta(layer: PaCALayer) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda delta, input: functional_call(layer, {"paca_delta": delta}, (input,))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=KINDS)
def layer(request: pytest.FixtureRequest) -> PaCALayer:
    return pair_of(request.param)[0]


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_another_delta_makes_another_weight(layer: PaCALayer, grad_mode: bool, needs_grad: bool) -> None:
    delta, input = random(OUT, R).requires_grad_(needs_grad), random(2, 5, IN, seed=2)
    before = layer(input)
    with torch.set_grad_enabled(grad_mode):
        torch.testing.assert_close(with_delta(layer)(delta, input), expected(layer, delta, input))
    assert torch.equal(layer(input), before)


def test_another_delta_is_differentiated_to_second_order(layer: PaCALayer) -> None:
    arguments = (random(OUT, R).requires_grad_(), random(3, IN, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(with_delta(layer), arguments)
    assert torch.autograd.gradgradcheck(with_delta(layer), arguments)


def test_gradients_per_sample(layer: PaCALayer) -> None:
    delta, inputs = layer.paca_delta.detach(), random(5, IN)

    def loss(delta: Tensor, input: Tensor) -> Tensor:
        return with_delta(layer)(delta, input).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(delta, inputs)
    for input, gradient in zip(inputs, found, strict=True):
        layer.paca_delta.grad = None
        layer(input).square().sum().backward()
        torch.testing.assert_close(gradient, layer.paca_delta.grad)


def test_several_deltas_at_once(layer: PaCALayer) -> None:
    deltas, input = random(3, OUT, R), random(5, IN, seed=2)
    found = vmap(with_delta(layer), in_dims=(0, None))(deltas, input)
    torch.testing.assert_close(found, torch.stack([expected(layer, delta, input) for delta in deltas]))


def test_maps_and_jacobians_of_the_input(layer: PaCALayer) -> None:
    input, tangent = random(5, IN), random(5, IN, seed=2)
    weight = weight_of(layer, layer.paca_delta.detach())
    mapped = vmap(layer)(input)
    torch.testing.assert_close(mapped, layer(input))
    mapped.sum().backward()
    assert layer.paca_delta.grad is not None
    torch.testing.assert_close(jacrev(layer)(input[0]), weight)
    torch.testing.assert_close(jvp(layer, (input,), (tangent,))[1], tangent @ weight.t())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(input, tangent)))
        torch.testing.assert_close(dual.tangent, tangent @ weight.t())


@pytest.mark.parametrize("kind", ["dense", "transposed"])
def test_a_traced_layer_trains(kind: str) -> None:
    layer, input = pair_of(kind)[0], random(5, IN)
    traced = torch.jit.trace(layer, input)
    with torch.no_grad():
        layer.paca_delta.add_(1.0)
    layer.write_columns()
    gradients = []
    for module in (layer, traced):
        layer.paca_delta.grad = None
        output = module(input)
        output.square().sum().backward()
        gradients.append((output, layer.paca_delta.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda output: output.square().sum()], ids=["linear", "quadratic"])
def test_a_second_derivative_of_a_layer_that_trains_is_refused(
    layer: PaCALayer, loss: Callable[[Tensor], Tensor]
) -> None:
    input = random(5, IN).requires_grad_()
    with pytest.raises(PaCAError, match=r"create_graph=True reached a PaCA layer.*torch.func.functional_call"):
        torch.autograd.grad(loss(layer(input)), input, create_graph=True)


def test_a_frozen_layer_has_second_derivatives(layer: PaCALayer) -> None:
    layer.requires_grad_(False)
    assert torch.autograd.gradgradcheck(layer, random(3, IN).requires_grad_())


def test_expanded_weights_are_refused() -> None:
    with pytest.raises(PaCAError, match=r"ExpandedWeight \(call_for_per_sample_grads\).*Use torch.func.vmap"):
        call_for_per_sample_grads(pair_of("dense")[0], batch_size=5)(random(5, IN))


def test_another_parameter_is_refused_without_its_weight() -> None:
    """A parameter goes through the tap, which needs a weight that fits."""
    layer, other = pair_of("dense")[0], pair_of("dense")[0]
    with torch.no_grad():
        other.paca_delta.add_(1.0)
    other.write_columns()
    input, parameters = random(5, IN), dict(other.named_parameters())
    with pytest.raises(PaCAError, match="has moved since its weight was written"):
        functional_call(layer, {"paca_delta": other.paca_delta}, (input,))
    assert torch.equal(functional_call(layer, parameters, (input,)), other(input))
    layer(input)


def test_own_parameters_by_functional_call_are_nothing_special(layer: PaCALayer) -> None:
    input = random(5, IN)
    output = functional_call(layer, dict(layer.named_parameters()), (input,))
    assert torch.equal(output, layer(input))
    assert "ColumnGradient" in type(output.grad_fn).__name__  # the tap


def test_a_copy_in_a_functional_call_is_trained(layer: PaCALayer) -> None:
    """Detached copies of all parameters that can have a gradient, as torch.func's tutorials pass them."""
    input = random(5, IN)
    parameters = {name: value.detach().clone() for name, value in layer.named_parameters() if value.is_floating_point()}
    own = copy.deepcopy(layer)
    own(input).square().sum().backward()
    found = grad(lambda p: functional_call(layer, p, (input,)).square().sum())(parameters)
    torch.testing.assert_close(found["paca_delta"], own.paca_delta.grad)


# -- Nested tensors


def jagged(*, requires_grad: bool = False) -> Tensor:
    rows = [random(2, IN), random(3, IN, seed=2)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=requires_grad)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_jagged_inputs(layer: PaCALayer, grad_mode: bool) -> None:
    input = jagged()
    with torch.set_grad_enabled(grad_mode):
        output = layer(input)
        torch.testing.assert_close(output.values(), layer(input.values()))
    assert torch.equal(output.offsets(), input.offsets())
    assert (output.sin() * output).shape == output.shape  # jagged alike
    assert (output + layer(input)).shape == output.shape


def test_jagged_gradients(layer: PaCALayer) -> None:
    results = []
    for nested in (True, False):
        layer.paca_delta.grad = None
        input = jagged(requires_grad=True)
        output = layer(input).values() if nested else layer(input.values())
        output.square().sum().backward()
        results.append((input.grad.values(), layer.paca_delta.grad))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_other_nested_tensors_are_refused() -> None:
    strided = torch.nested.nested_tensor([torch.randn(2, IN), torch.randn(3, IN)])
    for input in (strided, jagged().transpose(1, 2)):
        with pytest.raises(PaCAError, match=r"takes nested tensors of shape \(batch, jagged, ..., in_features\)"):
            pair_of("dense")[0](input)


# -- Weights whose elements share memory


def test_an_expanded_base_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    model[0].weight = nn.Parameter(torch.randn(1, IN).expand(OUT, IN))
    with pytest.raises(PaCAError, match=r"its weight is an expanded view"):
        apply_paca(model, PaCAConfig(r=R, target_modules=["0"]))
    with pytest.raises(PaCAError, match=r"no linear layer that can be converted.*0: its weight is an expanded view"):
        apply_paca(model, PaCAConfig(r=R))
    assert type(model[0]) is nn.Linear
