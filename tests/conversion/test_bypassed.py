"""Layers whose weight is read without a call are left alone and named: their deltas would never train."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, paca_layers
from tests.guests.models import mamba


class Reads(nn.Module):
    """Reads the weight of each layer in another way; fills and describes them besides."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.multiplied, self.passed, self.handed = (nn.Linear(8, 8) for _ in range(4))
        self.fused, self.described = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x) @ self.multiplied.weight.t()
        x = F.linear(x, self.passed.weight, self.passed.bias)
        x = self.through(self.handed, x)
        x = F.linear(x, self.fused.weight) if x.is_cuda else self.fused(x)
        return self.described(x.to(self.described.weight.dtype)) * self.multiplied.in_features

    def through(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return layer(x)


class Inherits(Reads):
    """Reads nothing itself."""


@pytest.mark.parametrize("cls", [Reads, Inherits])
def test_layers_that_are_read_and_never_called_are_left_alone(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls(), nn.ReLU())
    report = apply_paca(model, PaCAConfig(r=2))
    assert [path for path, _ in paca_layers(model)] == ["0.called", "0.handed", "0.fused", "0.described"]
    reason = f"{cls.__name__} reads its weight without calling it"
    assert report.skipped == {"0.multiplied": reason, "0.passed": reason}
    model(torch.ones(3, 8)).sum().backward()
    assert all(layer.paca_delta.grad is not None for _, layer in paca_layers(model))


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
MIXERS = {
    "MambaMixer": mamba,
    "FalconMambaMixer": lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**SIZES, state_size=4)),
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_whose_step_is_read(name: str) -> None:
    model = MIXERS[name]()
    report = apply_paca(model, PaCAConfig(r=2))
    assert report.skipped["backbone.layers.0.mixer.dt_proj"] == f"{name} reads its weight without calling it"
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert all(layer.paca_delta.grad is not None for _, layer in paca_layers(model))


def test_naming_such_a_layer_is_refused() -> None:
    with pytest.raises(PaCAError, match=r"names 'backbone.layers.0.mixer.dt_proj'.*MambaMixer reads its weight with"):
        apply_paca(mamba(), PaCAConfig(r=2, target_modules=["in_proj", "dt_proj"]))


def test_a_class_without_source_is_taken_as_it_is() -> None:
    namespace = {"nn": nn}
    exec("class Typed(nn.Module):\n  def forward(self, x):\n    return x @ self.layer.weight", namespace)
    model = namespace["Typed"]()
    model.layer = nn.Linear(8, 8)
    assert len(apply_paca(model, PaCAConfig(r=2)).layers) == 1  # the first step warns of it
