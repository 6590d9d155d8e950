"""Columns chosen by weights, activations and gradients are those that plain computations favour."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu
from transformers.pytorch_utils import Conv1D

from paca_lightning import PaCAConfig, PaCAError, apply_paca, paca_layers
from tests.tiny import tiny_llama


class Classifier(nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        output = self.second(self.dropout(relu(self.first(input))))
        return output if target is None else cross_entropy(output.flatten(0, -2), target.flatten())


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(5, 3, 12) * torch.rand(12), torch.randint(6, (5, 3))) for _ in range(3)]


def top(scores: Tensor, r: int) -> list[int]:
    return sorted(scores.topk(r).indices.tolist())


def chosen(model: nn.Module) -> dict[str, list[int]]:
    return {path: layer.paca_indices.tolist() for path, layer in paca_layers(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_norm_takes_the_columns_of_largest_norm(model: Classifier, dtype: torch.dtype) -> None:
    model.to(dtype)
    expected = {name: top(getattr(model, name).weight.float().norm(dim=0), 3) for name in ("first", "second")}
    apply_paca(model, PaCAConfig(r=3, selection="weight_norm"))
    assert chosen(model) == expected


def test_weight_norm_of_a_transposed_layer_goes_over_its_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(10, 12))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(12, 1))
    expected = top(model[0].weight.norm(dim=1), 3)
    apply_paca(model, PaCAConfig(r=3, selection="weight_norm"))
    assert chosen(model) == {"0": expected}


def test_activation_norm_takes_the_channels_of_largest_norm_over_all_tokens(
    model: Classifier, batches: list[tuple[Tensor, Tensor]]
) -> None:
    first = sum(input.flatten(0, 1).square().sum(0) for input, _ in batches)
    second = sum(relu(model.first(input)).detach().flatten(0, 1).square().sum(0) for input, _ in batches)  # no dropout
    apply_paca(model, PaCAConfig(r=3, selection="activation_norm"), calibration=batches)
    assert chosen(model) == {"first": top(first, 3), "second": top(second, 3)}


def test_gradient_norm_takes_the_columns_of_largest_gradient(
    model: Classifier, batches: list[tuple[Tensor, Tensor]]
) -> None:
    dense = copy.deepcopy(model).eval()
    scores = {"first": torch.zeros(12), "second": torch.zeros(10)}
    for input, target in batches:
        dense.zero_grad()
        dense(input, target).backward()
        for name, score in scores.items():
            score += getattr(dense, name).weight.grad.square().sum(0)
    apply_paca(model, PaCAConfig(r=3, selection="gradient_norm"), calibration=batches)
    assert chosen(model) == {name: top(score, 3) for name, score in scores.items()}


@pytest.mark.parametrize("selection", ["activation_norm", "gradient_norm"])
def test_batches_may_be_dictionaries_and_models_hugging_faces(selection: str) -> None:
    model, dense = tiny_llama(), tiny_llama().eval()
    ids = torch.randint(0, 384, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    apply_paca(model, PaCAConfig(r=4, selection=selection, target_modules=["down_proj"]), calibration=[batch])

    inputs = {}
    for layer in (0, 1):
        projection = dense.model.layers[layer].mlp.down_proj
        projection.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0].detach()}))
    dense(**batch).loss.backward()
    for layer, (_, converted) in enumerate(paca_layers(model)):
        weight = dense.model.layers[layer].mlp.down_proj.weight
        score = inputs[layer].flatten(0, 1) if selection == "activation_norm" else weight.grad
        assert converted.paca_indices.tolist() == top(score.square().sum(0), 4)


def test_columns_chosen_by_data_start_from_the_base_weight(
    model: Classifier, batches: list[tuple[Tensor, Tensor]]
) -> None:
    before = copy.deepcopy(model.state_dict())
    apply_paca(model, PaCAConfig(r=3, selection="activation_norm"), calibration=batches)
    for path, layer in paca_layers(model):
        assert torch.equal(layer.weight, before[f"{path}.weight"])
        assert torch.equal(layer.paca_base_columns, before[f"{path}.weight"][:, layer.paca_indices])


@pytest.mark.parametrize("selection", ["activation_norm", "gradient_norm"])
def test_calibration_leaves_modes_gradients_hooks_and_random_state(
    model: Classifier, batches: list[tuple[Tensor, Tensor]], selection: str
) -> None:
    model.dropout.eval()  # by hand, in a model in train mode
    gradient = torch.ones(6)
    model.second.bias.grad = gradient
    state = torch.get_rng_state()
    apply_paca(model, PaCAConfig(r=3, selection=selection), calibration=batches)
    assert (model.training, model.first.training, model.dropout.training) == (True, True, False)
    assert model.second.bias.grad is gradient
    assert [layer.paca_delta.grad for _, layer in paca_layers(model)] == [None, None]
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_1d_input_is_one_token() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    batch = torch.tensor([0.0, 3.0, 1.0, 2.0])
    apply_paca(model, PaCAConfig(r=2, selection="activation_norm"), calibration=[batch])
    assert chosen(model) == {"0": [1, 3]}


def test_given_indices_override_the_data(model: Classifier, batches: list[tuple[Tensor, Tensor]]) -> None:
    given = {"first": torch.tensor([0, 1, 2]), "second": torch.tensor([3, 4, 5])}
    apply_paca(model, PaCAConfig(r=3, selection="activation_norm"), indices=given)  # no calibration needed
    assert chosen(model) == {"first": [0, 1, 2], "second": [3, 4, 5]}


@pytest.mark.parametrize(
    ("selection", "batches", "message"),
    [
        ("activation_norm", None, r"selection='activation_norm' looks at data: pass calibration="),
        ("activation_norm", [], "selection='activation_norm' needs calibration batches, and there are none"),
        ("gradient_norm", [torch.randn(2, 12)], "selection='gradient_norm' needs a loss.*Include labels"),
        ("activation_norm", [torch.zeros(2, 12)], "the calibration batches never reach 'first'"),
        ("activation_norm", [torch.full((2, 12), torch.nan)], "the calibration batches give NaN or Inf in 'first'"),
    ],
)
def test_data_that_cannot_choose_is_refused_and_the_model_left_as_it_was(
    model: Classifier, selection: str, batches: Any, message: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PaCAError, match=message):
        apply_paca(model, PaCAConfig(r=3, selection=selection), calibration=batches)
    assert [type(module) for module in (model.first, model.second)] == [nn.Linear, nn.Linear]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_called_by_keyword_count() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = ByName()
    batch = torch.tensor([[1.0, 3.0, 2.0, 4.0]])
    apply_paca(model, PaCAConfig(r=2, selection="activation_norm"), calibration=[batch])
    assert model.layer.paca_indices.tolist() == [1, 3]
