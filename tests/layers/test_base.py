"""A PaCA layer keeps its precision when cast, moved and copied, and takes any mix of checkpoints."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, PaCALinear, apply_paca, paca_layers
from tests.layers.reference import ALPHA, IN, INDICES, OUT, R, layer_and_twin


def expected_weight(layer: PaCALinear) -> Tensor:
    """Base columns plus scaled delta, as cast, in plain torch."""
    columns = torch.add(layer.paca_base_columns, layer.paca_delta, alpha=layer.scaling)
    return layer.weight.detach().index_copy(1, layer.paca_indices, columns.detach().to(layer.weight.dtype))


@pytest.mark.parametrize(
    ("start", "cast", "weight", "delta"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64, torch.float64),
    ],
)
def test_a_cast_never_narrows_the_delta_and_keeps_the_weight_in_step(
    start: torch.dtype, cast: torch.dtype, weight: torch.dtype, delta: torch.dtype
) -> None:
    layer, _ = layer_and_twin(start)
    before = layer.paca_delta.detach().clone()
    parameter = layer.paca_delta
    layer.paca_delta.grad = before.clone()
    layer.to(cast)
    assert layer.paca_delta is parameter  # the optimizer's
    assert (layer.weight.dtype, layer.paca_delta.dtype, layer.paca_delta.grad.dtype) == (weight, delta, delta)
    assert torch.equal(layer.paca_delta, before.to(delta))
    assert layer.paca_indices.dtype == torch.int64
    assert torch.equal(layer.paca_indices, INDICES)
    assert torch.equal(layer.weight, expected_weight(layer))


def test_a_cast_base_is_restored_as_the_base_would_have_been_cast() -> None:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT)
    layer, _ = layer_and_twin()
    layer.load_state_dict(base.state_dict(), strict=False)
    layer.to(torch.bfloat16)
    layer.restore_columns()
    assert torch.equal(layer.weight, base.weight.bfloat16())


def test_an_empty_move_keeps_the_indices_and_starts_the_delta_at_zero() -> None:
    base = nn.Linear(IN, OUT)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(IN, OUT))
    apply_paca(model, PaCAConfig(r=R, seed=3))
    model.to_empty(device="cpu")
    model.load_state_dict({f"0.{name}": value for name, value in base.state_dict().items()}, strict=False)

    expected = nn.Sequential(copy.deepcopy(base))
    apply_paca(expected, PaCAConfig(r=R, seed=3))
    assert torch.equal(model[0].paca_indices, expected[0].paca_indices)
    assert torch.equal(model[0].paca_delta, torch.zeros(OUT, R))
    assert torch.equal(model[0].weight, base.weight)
    assert torch.equal(model[0].paca_base_columns, base.weight[:, model[0].paca_indices])


def test_an_empty_move_of_a_trained_layer_keeps_delta_and_indices() -> None:
    layer, _ = layer_and_twin()
    delta = layer.paca_delta.detach().clone()
    layer.to_empty(device="cpu")
    assert torch.equal(layer.paca_indices, INDICES)
    assert torch.equal(layer.paca_delta, delta)


def test_a_copy_is_independent() -> None:
    layer, twin = layer_and_twin()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.paca_delta.add_(1)
    other.write_columns()
    assert torch.equal(layer.weight, twin.weight)
    assert not torch.equal(other.weight, twin.weight)
    assert torch.equal(other.weight, expected_weight(other))


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_saved_layer_comes_back(weights_only: bool) -> None:
    layer, _ = layer_and_twin()
    file = io.BytesIO()
    torch.save(layer.state_dict() if weights_only else layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    if weights_only:
        other = PaCALinear(IN, OUT, r=R, alpha=ALPHA, indices=torch.tensor([0, 1, 4, 5]))
        other.load_state_dict(loaded)
        loaded = other
    input = torch.randn(3, IN)
    assert torch.equal(loaded(input), layer(input))
    for name, value in layer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_base_checkpoint_replaces_the_base_under_the_delta() -> None:
    layer, _ = layer_and_twin()
    base = nn.Linear(IN, OUT)
    result = layer.load_state_dict(base.state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["paca_base_columns", "paca_delta", "paca_indices"]
    assert torch.equal(layer.paca_base_columns, base.weight[:, INDICES])
    expected = base.weight.detach().clone()
    expected[:, INDICES] = expected[:, INDICES].add(layer.paca_delta.detach(), alpha=ALPHA / R)
    assert torch.equal(layer.weight, expected)
    layer.restore_columns()
    assert torch.equal(layer.weight, base.weight)


def test_a_full_checkpoint_brings_indices_and_base_columns_along() -> None:
    layer, _ = layer_and_twin()
    other = PaCALinear(IN, OUT, r=R, alpha=ALPHA, indices=torch.tensor([0, 1, 4, 5]))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    other.restore_columns()
    layer.restore_columns()
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("theirs", [INDICES, torch.tensor([0, 1, 3, 5])], ids=["same indices", "other indices"])
def test_an_adapter_moves_the_layer_to_its_columns_and_restores_those_left(theirs: Tensor) -> None:
    layer, _ = layer_and_twin()
    base = nn.Linear(IN, OUT)
    layer.load_state_dict(base.state_dict(), strict=False)
    delta = torch.randn(OUT, R)
    layer.load_state_dict({"paca_indices": theirs, "paca_delta": delta}, strict=False)
    expected = base.weight.detach().clone()
    expected[:, theirs] = expected[:, theirs].add(delta, alpha=ALPHA / R)
    assert torch.equal(layer.weight, expected)
    layer.restore_columns()
    assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_on_meta_takes_its_weights_from_a_base_checkpoint(assign: bool) -> None:
    base = nn.Linear(IN, OUT)
    layer = PaCALinear(IN, OUT, device="meta", r=R, indices=INDICES)
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(base.state_dict(), strict=False, assign=assign)
    assert torch.equal(layer.paca_base_columns, base.weight[:, INDICES])
    assert torch.equal(layer.paca_delta, torch.zeros(OUT, R))
    layer.write_columns()
    assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paca_delta": None}, "The checkpoint has paca_indices of 'up' but not its paca_delta. It is incomplete."),
        ({"paca_indices": None}, "The checkpoint has paca_delta of 'up' but not its paca_indices. It is incomplete."),
        ({"paca_delta": torch.zeros(OUT, 3)}, r"The delta of 'up' has shape \(16, 3\) in the checkpoint and \(16, 4\)"),
        ({"paca_indices": torch.tensor([1, 2, 3, 24])}, "'up' reach from 1 to 24, outside the 24 input columns"),
        ({"paca_indices": torch.tensor([1, 3, 2, 4])}, "'up' are not sorted and unique"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    layer, _ = layer_and_twin()
    adapter = {"paca_indices": INDICES, "paca_delta": torch.zeros(OUT, R)} | change
    state = {f"up.{name}": value for name, value in adapter.items() if value is not None}
    with pytest.raises(PaCAError, match=message):
        nn.ModuleDict({"up": layer}).load_state_dict(state, strict=False)


def test_the_layers_of_a_model_are_found_once_each() -> None:
    shared = PaCALinear(IN, IN, r=R)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(paca_layers(model)) == [("0", shared)]
