"""A PaCA layer trains like a dense layer with a masked gradient, and behaves like one elsewhere."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca_lightning import PaCAConfig, PaCAError, PaCALinear, apply_paca, attach, merge, paca_layers
from tests.layers.reference import ALPHA, IN, INDICES, OUT, ROUNDING, R, layer_and_twin, relative


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    ],
    ids=["SGD", "AdamW"],
)
def test_20_steps_equal_a_dense_update_with_a_masked_gradient(
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], accumulate: int
) -> None:
    """Largest difference of any weight after 20 steps: 1.8e-16 in fp64, of updates of up to 0.5."""
    torch.manual_seed(0)
    start = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = PaCALinear(IN, OUT, dtype=torch.float64, r=R, alpha=ALPHA, indices=INDICES)
    layer.load_state_dict(start.state_dict(), strict=False)

    # The reference knows nothing of columns: a dense update, of which a mask lets the selected columns learn. Decay
    # pulls the update to zero, which is the weight to the pretrained one.
    mask = torch.zeros(OUT, IN, dtype=torch.float64)
    mask[:, INDICES] = 1
    update = torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True)

    optimizer, reference = make_optimizer([layer.paca_delta]), make_optimizer([update])
    attach(optimizer, layer)
    for step in range(1, 20 * accumulate + 1):
        input, target = torch.randn(5, IN, dtype=torch.float64), torch.randn(5, OUT, dtype=torch.float64)
        (layer(input) - target).square().mean().backward()
        dense = start.weight.detach() + ALPHA / R * update
        (nn.functional.linear(input, dense, start.bias.detach()) - target).square().mean().backward()
        if step % accumulate == 0:
            update.grad *= mask
            for one in (optimizer, reference):
                one.step()
                one.zero_grad()
    expected = (start.weight + ALPHA / R * update).detach()
    assert (expected - start.weight).abs().max() > 0.1
    assert (layer.weight - expected).abs().max() < 4e-15


def test_a_first_layer_computes_no_gradient_of_its_input() -> None:
    layer, _ = layer_and_twin()
    output = layer(torch.randn(7, IN))
    tap = output.grad_fn
    # The linear map is no part of the graph: neither its input nor its weight needs a gradient.
    assert [type(node).__name__ for node, _ in tap.next_functions if node is not None] == ["AccumulateGrad"]


def test_without_gradients_nothing_is_tapped() -> None:
    layer, twin = layer_and_twin()
    input = torch.randn(2, 5, IN)
    with torch.no_grad():
        assert torch.equal(layer(input), twin(input))
    with torch.inference_mode():
        assert torch.equal(layer(input), twin(input))
    layer.requires_grad_(False)
    assert layer(input).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, IN), (2, 5, IN)], ids=["2-D", "3-D"])
def test_gpt2s_transposed_layer_trains_alike(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    twin = Conv1D(OUT, IN).to(dtype)
    model = nn.Sequential(copy.deepcopy(twin))
    apply_paca(model, PaCAConfig(r=R, alpha=ALPHA), indices={"0": INDICES})
    layer = model[0]
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert torch.equal(layer.weight, twin.weight)  # the layout of base checkpoints stays

    input = torch.randn(shape, dtype=dtype)
    outputs = [module(input) for module in (model, twin)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.float().square().sum().backward()
    expected = ALPHA / R * twin.weight.grad[INDICES].t()
    assert relative(layer.paca_delta.grad, expected) <= ROUNDING[dtype]

    torch.optim.SGD([layer.paca_delta], lr=0.1).step()
    layer.write_columns()
    trained = twin.weight.detach().clone()
    trained[INDICES] = trained[INDICES].float().add(layer.paca_delta.detach().t(), alpha=ALPHA / R).to(dtype)
    assert torch.equal(layer.weight, trained)
    merge(model)
    assert type(model[0]) is Conv1D
    assert torch.equal(model[0].weight, trained)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("kind", [Conv1D, nn.Linear])
def test_inputs_need_not_be_contiguous(kind: type[nn.Module], grad_mode: bool) -> None:
    twin = Conv1D(OUT, IN) if kind is Conv1D else nn.Linear(IN, OUT)
    model = nn.Sequential(copy.deepcopy(twin))
    apply_paca(model, PaCAConfig(r=R))
    input = torch.randn(IN, 5, 2).permute(2, 1, 0)
    expected = twin(input.contiguous())
    with torch.set_grad_enabled(grad_mode):
        torch.testing.assert_close(model(input), expected)


def test_forward_hooks_survive_and_see_what_they_saw() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU())
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    apply_paca(model, PaCAConfig(r=R))
    model(torch.randn(3, IN)).sum().backward()
    merge(model)(torch.randn(3, IN))
    assert seen == ["PaCALinear", "Linear"]


@pytest.mark.parametrize("r", [0, -1, IN + 1])
def test_a_rank_that_does_not_fit_is_refused(r: int) -> None:
    with pytest.raises(PaCAError, match=rf"r={r} must lie between 1 and in_features=24"):
        PaCALinear(IN, OUT, r=r)


def test_a_layer_built_by_hand_can_be_merged() -> None:
    layer, twin = layer_and_twin()
    model = merge(nn.Sequential(layer))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, twin.weight)


def test_the_layer_prints_its_rank_and_scaling() -> None:
    layer, _ = layer_and_twin()
    assert repr(layer) == "PaCALinear(in_features=24, out_features=16, bias=True, r=4, scaling=1.5)"


def test_compiles_where_layers_differ_in_their_scaling() -> None:
    """Then torch.compile makes the scaling symbolic."""
    eager = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    apply_paca(eager, PaCAConfig(r=2, alpha_pattern={"0": 3.0, "1": 5.0, "2": 7.0}))
    compiled = copy.deepcopy(eager)
    for layer in compiled:
        layer.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    eager(x).sum().backward()
    compiled(x).sum().backward()
    for (_, expected), (_, layer) in zip(paca_layers(eager), paca_layers(compiled), strict=True):
        torch.testing.assert_close(layer.paca_delta.grad, expected.paca_delta.grad)
