"""The write-back hangs behind every step of an optimizer, from its first one on."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, apply_paca, attach, merge, unload
from tests.callbacks.test_paca import DATA, Module, in_step, loader, moved, network, trainer  # noqa: F401  (a fixture)


class RatedModule(Module):
    """Has a learning rate to find, and notes what each step had and lost."""

    lr = 1e-2

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[float, float]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.steps.append((self.trainer.optimizers[0].param_groups[0]["lr"], loss.item()))
        return loss


def losses_at(rates: list[float], *, train: bool) -> list[float]:
    """Losses of a plain loop over the same batches, each step with a rate of its own, or without any step."""
    model = Module()  # paths choose the columns
    apply_paca(model, PaCAConfig(r=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    attach(optimizer, model)
    losses = []
    for rate, batch in zip(rates, itertools.cycle(DATA.split(4)), strict=False):
        optimizer.param_groups[0]["lr"] = rate
        loss = model.net(batch).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if train:
            optimizer.step()
    return losses


def test_a_learning_rate_finder_sees_the_weights_move(trainer: Any) -> None:  # noqa: F811
    run, module = trainer(PaCAStrategy(PaCAConfig(r=4)), max_epochs=20), RatedModule()
    Tuner(run).lr_find(module, loader(), num_training=20, min_lr=1e-2, max_lr=1, update_attr=False)
    rates, losses = map(list, zip(*module.steps, strict=True))
    assert rates[0] < 0.02 < 0.5 < rates[-1]
    assert losses == pytest.approx(losses_at(rates, train=True))
    assert losses != pytest.approx(losses_at(rates, train=False), rel=1e-2)


class ReadsAWeight(nn.Module):
    """Multiplies by the second layer's weight without calling the layer, which its source does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        second = self.second
        return self.first(x) @ second.weight.t()


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


def trained_network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    apply_paca(model, PaCAConfig(r=4))
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("back", [merge, unload])
def test_a_step_after_going_back_says_what_to_do(back: Any) -> None:
    model, optimizer = trained_network()
    handle = attach(optimizer, model)
    model(DATA).sum().backward()
    back(model)
    with pytest.raises(PaCAError, match=r"'0' is a plain layer again .*Remove the handle that attach\(\) returned"):
        optimizer.step()
    handle.remove()
    optimizer.step()


class Wrapper:
    """An optimizer around another one, without PyTorch's hooks; Accelerate's and others are such."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    model, optimizer = trained_network()
    wrapper = Wrapper(optimizer)
    attach(wrapper, model)  # type: ignore[arg-type]
    model(DATA).sum().backward()
    wrapper.step()
    assert moved(model)
    assert in_step(model)


def test_an_optimizer_without_hooks_is_refused() -> None:
    class Own:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.param_groups = [{"params": parameters}]

    model, _ = trained_network()
    with pytest.raises(PaCAError, match=r"Own takes no step hooks.*call write_columns\(model\) after each step"):
        attach(Own(list(model.parameters())), model)  # type: ignore[arg-type]


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "pruning mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("back", [merge, unload])
def test_a_parametrization_after_the_conversion_is_refused(kind: str, back: Any) -> None:
    model, optimizer = trained_network()
    COMPUTED[kind](model[0])
    for action in (lambda: attach(optimizer, model), lambda: back(model)):
        with pytest.raises(PaCAError, match=r"'0' was parametrized after its conversion \(spectral norm, "):
            action()


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "as on a GPU"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_parametrization_during_training_is_refused_at_the_next_step(
    kind: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if together:  # refused before anything is launched
        monkeypatch.setattr("paca_lightning.layers.fused_write.can_fuse", lambda device: True)
    model, optimizer = trained_network()
    attach(optimizer, model)
    COMPUTED[kind](model[0])
    model(DATA).sum().backward()
    with pytest.raises(PaCAError, match="'0' was parametrized after its conversion"):
        optimizer.step()


@pytest.mark.parametrize("name", ["weight", "paca_base_columns"])
def test_what_a_layer_keeps_frozen_cannot_be_trained(name: str) -> None:
    model, _ = trained_network()
    model[0].get_parameter(name).requires_grad_(True)
    with pytest.raises(PaCAError, match=rf"'0\.{name}' was thawed .* PaCAConfig\(exclude_modules=\['0'\]\)"):
        attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model)


def test_a_weight_that_is_thawed_during_training_is_refused_at_the_next_step() -> None:
    model, optimizer = trained_network()
    attach(optimizer, model)
    before = model[0].weight.requires_grad_(True).clone()
    optimizer.add_param_group({"params": [model[0].weight]})
    model(DATA).sum().backward()
    with pytest.raises(PaCAError, match=r"'0\.weight' was thawed"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def share_parameter(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


def share_storage(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[0].weight.detach(), requires_grad=False)


@pytest.mark.parametrize("share", [share_parameter, share_storage])
def test_weights_that_are_tied_after_the_conversion_are_refused(share: Callable[[nn.Sequential], None]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    apply_paca(model, PaCAConfig(r=2))
    share(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(PaCAError, match=r"'0\.weight' shares its memory with '2\.weight' since the conversion"):
        attach(optimizer, model)
