"""The write-back hangs behind every step of an optimizer, from its first one on."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, apply_paca, attach
from tests.callbacks.test_paca import Module, loader, network, trainer  # noqa: F401  (a fixture)


def test_a_learning_rate_finder_sees_the_weights_move(trainer: Any) -> None:  # noqa: F811
    class WithRate(Module):
        lr = 1e-2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    run = trainer(PaCAStrategy(PaCAConfig(r=4)), max_epochs=20)
    finder = Tuner(run).lr_find(
        WithRate(), loader(), num_training=40, min_lr=1e-3, max_lr=1e3, early_stop_threshold=None, update_attr=False
    )
    losses = finder.results["loss"]
    assert max(losses) > 10 * losses[0] or not all(map(torch.isfinite, map(torch.tensor, losses)))  # far too large


def test_an_optimizer_with_many_evaluations_in_a_step_is_refused() -> None:
    model = network()
    apply_paca(model, PaCAConfig(r=4))
    with pytest.raises(PaCAError, match="LBFGS evaluates the loss several times"):
        attach(torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad]), model)


class ReadsAWeight(nn.Module):
    """Multiplies by the second layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.second.weight.t()


def test_layers_that_never_train_are_told_once() -> None:
    model = ReadsAWeight()
    apply_paca(model, PaCAConfig(r=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(optimizer, model)
    model(torch.ones(3, 8)).sum().backward()
    with pytest.warns(UserWarning, match=r"1 PaCA layers had no gradient in the first step \('second' is one\)"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
