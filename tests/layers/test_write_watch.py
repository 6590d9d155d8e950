"""A forgotten write-back is noticed at the next training forward, whatever moved the delta."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach, disable_paca, merge, paca_layers, write_columns
from paca_lightning.layers import write_watch

INPUT = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
FORGOTTEN = r"The delta of '0' has moved since its weight was written, .*attach\(optimizer, model\)"


def converted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
    apply_paca(model, PaCAConfig(r=2))
    return model


def deltas(model: nn.Module) -> list[nn.Parameter]:
    return [layer.paca_delta for _, layer in paca_layers(model)]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),  # moves no version counter
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_a_write_back_is_noticed(name: str) -> None:
    model = converted()
    optimizer = OPTIMIZERS[name](deltas(model))
    model(INPUT).sum().backward()
    optimizer.step()
    with pytest.raises(PaCAError, match=FORGOTTEN):
        model(INPUT)
    write_columns(model)
    model(INPUT).sum().backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_steps_go_on(name: str) -> None:
    model = converted()
    optimizer = OPTIMIZERS[name](deltas(model))
    attach(optimizer, model)
    for _ in range(3):
        model(INPUT).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_second_optimizer_without_a_write_back_is_noticed() -> None:
    model = converted()
    first, second = (torch.optim.SGD([delta], lr=0.1) for delta in deltas(model))
    attach(first, model)
    model(INPUT).sum().backward()
    first.step()
    model(INPUT)
    second.step()
    with pytest.raises(PaCAError, match="The delta of '1' has moved"):
        model(INPUT)


def test_an_optimizer_that_passes_over_a_delta_does_not_move_it() -> None:
    model = converted()
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    optimizer.step()  # no gradient yet
    model(INPUT)


def test_a_change_of_ones_own_is_noticed() -> None:
    model = converted()
    with torch.no_grad():
        model[0].paca_delta.add_(1.0)
    with pytest.raises(PaCAError, match=FORGOTTEN):
        model(INPUT)
    with torch.no_grad():
        model(INPUT)  # only a forward that trains is refused


def test_accumulating_gradients_is_no_change() -> None:
    model = converted()
    for _ in range(3):
        model(INPUT).sum().backward()


def test_copies_casts_and_loaded_states_are_in_step() -> None:
    model = converted()
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    attach(optimizer, model)
    model(INPUT).sum().backward()
    optimizer.step()
    copy.deepcopy(model)(INPUT)
    other = converted()
    other.load_state_dict(model.state_dict())
    other(INPUT)
    other.double()(INPUT.double())
    with disable_paca(other):
        other(INPUT.double())
    other(INPUT.double())


def test_a_change_that_the_weight_has_too_is_none() -> None:
    model = converted()
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    attach(optimizer, model)
    model(INPUT).sum().backward()
    optimizer.step()
    for tensor in model.parameters():  # as DDP does when it wraps a model
        tensor.detach().copy_(tensor.detach().clone())
    model(INPUT)


def test_a_cast_does_not_hide_a_forgotten_write_back() -> None:
    model = converted()
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    model(INPUT).sum().backward()
    optimizer.step()
    model.to("cpu", torch.float32)
    with pytest.raises(PaCAError, match=FORGOTTEN):
        model(INPUT)


def test_a_step_that_a_scaler_skips_is_no_step() -> None:
    model = converted()
    optimizer = torch.optim.SGD(deltas(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    (scaler.scale(model(INPUT).sum()) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not any(bool(delta.any()) for delta in deltas(model))
    model(INPUT)


def test_layers_that_are_gone_are_forgotten() -> None:
    gc.collect()
    before = len(write_watch.watched)
    model = converted()
    model(INPUT)
    assert len(write_watch.watched) == before + 2
    merge(model)
    del model
    gc.collect()
    assert len(write_watch.watched) == before
