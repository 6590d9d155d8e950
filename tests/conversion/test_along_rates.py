"""Norms trained along at a learning rate of their own: as if the optimizer had been built with two groups."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach, write_columns
from paca_lightning.conversion.along_rates import along_parameters, set_along_rates
from paca_lightning.tasks.schedules import CosineSchedule

LR, FACTOR = 1e-2, 0.25
CONFIG = PaCAConfig(r=4, train_norms=True, norms_lr=FACTOR)
DATA = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
Build = Callable[..., Any]


def network(config: PaCAConfig = CONFIG) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    apply_paca(model, config)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def two_groups(model: nn.Module, lr: Any = LR) -> list[dict[str, Any]]:
    """What a user would write by hand."""
    norms = {id(parameter) for parameter in along_parameters(model)}
    rest = [parameter for parameter in trainable(model) if id(parameter) not in norms]
    return [{"params": rest}, {"params": along_parameters(model), "lr": FACTOR * lr, "weight_decay": 0.0}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, steps: int = 20) -> list[list[float]]:
    """Train, and return the learning rates of each step."""
    rates = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(DATA).square().mean()
        loss.backward()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        write_columns(model)
        if isinstance(schedule, schedules.ReduceLROnPlateau):
            schedule.step(1.0)  # never better
        elif schedule is not None:
            schedule.step()
    return rates


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def sequence(optimizer: torch.optim.Optimizer) -> Any:
    warm = schedules.LinearLR(optimizer, 0.25, total_iters=4)
    return schedules.SequentialLR(optimizer, [warm, schedules.CosineAnnealingLR(optimizer, 12)], [6])


def chain(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.ChainedScheduler([sequence(optimizer), schedules.StepLR(optimizer, 5, 0.5)])


def by_group(schedule: Build, *names: str, **settings: Any) -> tuple[Build, Build]:
    """A schedule, and the same with a rate for each of two groups."""
    rates = {name: settings.pop(name) for name in names}
    each = {name: [rate, FACTOR * rate] for name, rate in rates.items()}
    return partial(schedule, **rates, **settings), partial(schedule, **each, **settings)


SCHEDULES: dict[str, Any] = {
    "none": lambda optimizer: None,
    "LambdaLR": lambda optimizer: schedules.LambdaLR(optimizer, lambda step: (step + 1) / 20),
    "MultiplicativeLR": lambda optimizer: schedules.MultiplicativeLR(optimizer, lambda step: 0.9),
    "StepLR": partial(schedules.StepLR, step_size=3),
    "PolynomialLR": partial(schedules.PolynomialLR, total_iters=30),
    "CosineAnnealingLR": partial(schedules.CosineAnnealingLR, T_max=20),
    "CosineAnnealingWarmRestarts": partial(schedules.CosineAnnealingWarmRestarts, T_0=5),
    "SequentialLR": sequence,
    "ChainedScheduler": chain,
    "CosineSchedule": partial(CosineSchedule, warmup_steps=3, total_steps=20),
    "OneCycleLR": by_group(schedules.OneCycleLR, "max_lr", max_lr=4 * LR, total_steps=21),
    "CyclicLR": by_group(
        schedules.CyclicLR, "base_lr", "max_lr", base_lr=LR, max_lr=4 * LR, step_size_up=3, cycle_momentum=False
    ),
    "ReduceLROnPlateau": by_group(schedules.ReduceLROnPlateau, "min_lr", min_lr=LR / 8, patience=2, factor=0.5),
    "SWALR": by_group(SWALR, "swa_lr", swa_lr=2 * LR, anneal_epochs=6),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_twenty_steps_under_any_schedule_equal_those_of_two_groups_bitwise(name: str) -> None:
    given = SCHEDULES[name]
    schedule, schedule_by_group = given if isinstance(given, tuple) else (given, given)
    model, plain = network(), network()
    optimizer = torch.optim.AdamW(trainable(model), lr=LR, weight_decay=0.1)
    expected = torch.optim.AdamW(two_groups(plain), lr=LR, weight_decay=0.1)
    built, expected_schedule = schedule(optimizer), schedule_by_group(expected)
    set_along_rates(optimizer, model, [] if built is None else [built])
    if built is not None and not isinstance(built, schedules.ChainedScheduler):
        assert built.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    rates = train(model, optimizer, built)
    assert train(plain, expected, expected_schedule) == rates
    assert len({tuple(step) for step in rates}) > 1 or name == "none"
    assert same(state(model), state(plain))


@pytest.mark.parametrize(
    ("optimizer_class", "lr"),
    [
        (partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1), LR),
        (torch.optim.RMSprop, LR),
        (torch.optim.Adadelta, LR),
        (partial(torch.optim.AdamW, foreach=True, capturable=False), LR),
        (torch.optim.Adam, torch.tensor(LR)),
        (partial(torch.optim.Adafactor, eps=(None, 1.0)), LR),
    ],
)
def test_attach_does_it_for_any_optimizer_in_a_plain_loop(optimizer_class: Build, lr: Any) -> None:
    model, plain = network(), network()
    optimizer = optimizer_class(trainable(model), lr=copy.deepcopy(lr))  # a schedule writes into a tensor
    expected = optimizer_class(two_groups(plain, lr), lr=copy.deepcopy(lr))
    attach(optimizer, model)
    attach(optimizer, model).remove()  # sets it once
    built, expected_schedule = (schedules.LinearLR(each, 0.5, total_iters=9) for each in (optimizer, expected))
    assert train(model, optimizer, built) == train(plain, expected, expected_schedule)
    assert same(state(model), state(plain))


def test_the_state_of_an_optimizer_goes_on_bitwise() -> None:
    whole, first, second = network(), network(), network()
    optimizers = [torch.optim.AdamW(trainable(model), lr=LR) for model in (whole, first, second)]
    for optimizer, model in zip(optimizers, (whole, first, second), strict=True):
        attach(optimizer, model)
    train(whole, optimizers[0], None, 8)
    train(first, optimizers[1], None, 4)
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    attach(optimizers[2], second)  # again: the rate is not multiplied twice
    rates = train(second, optimizers[2], None, 4)
    assert rates[0] == [LR, FACTOR * LR]
    assert same(state(second), state(whole))


def test_weight_decay_is_taken_from_norms_and_nothing_is_split_without_need() -> None:
    config = PaCAConfig(r=4, train_norms=True)
    model = network(config)
    optimizer = torch.optim.AdamW(trainable(model), lr=LR, weight_decay=0.1)
    attach(optimizer, model)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(LR, 0.1), (LR, 0.0)]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in along_parameters(model)]
    for settings in (config, PaCAConfig(r=4)):
        model = network(settings)
        optimizer = torch.optim.AdamW(trainable(model), lr=LR, weight_decay=0.0)
        schedules.StepLR(optimizer, 3)
        attach(optimizer, model)
        assert len(optimizer.param_groups) == 1


def test_a_group_of_norms_that_the_user_made_keeps_its_own_rate_times_the_factor() -> None:
    model = network()
    groups = two_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        group["params"] = [(names[id(parameter)], parameter) for parameter in group["params"]]
    optimizer = torch.optim.AdamW([groups[0], groups[1] | {"lr": 8 * LR}], lr=LR, weight_decay=0.1)
    attach(optimizer, model)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, FACTOR * 8 * LR]
    one = torch.optim.AdamW([(names[id(p)], p) for p in trainable(model)], lr=LR)
    attach(one, model)
    assert [group["param_names"] for group in one.param_groups] == [["0.paca_delta", "2.paca_delta"], ["1.weight"]]


class Elsewhere:
    """A schedule that knows its groups by itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None: ...


class FindsItsRate(torch.optim.AdamW):
    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self.param_groups[0] |= {"d": 1e-6, "growth_rate": 2.0}  # as Prodigy and D-Adaptation have them


@pytest.mark.parametrize(
    ("optimizer_class", "schedule", "complaint"),
    [
        (torch.optim.LBFGS, None, "LBFGS cannot be given another parameter group"),
        (FindsItsRate, None, "FindsItsRate finds its own"),
        (torch.optim.SGD, partial(schedules.CosineAnnealingLR, T_max=9, eta_min=1e-5), r"eta_min=1e-05\) ends at"),
        (torch.optim.SGD, Elsewhere, "Elsewhere was not built with, and it is no LRScheduler"),
    ],
)
def test_what_cannot_have_two_rates_is_refused_and_left_as_it_was(
    optimizer_class: Build, schedule: Any, complaint: str
) -> None:
    model = network()
    optimizer = optimizer_class(trainable(model), lr=LR)
    built = [] if schedule is None else [schedule(optimizer)]
    with pytest.raises(PaCAError, match=complaint):
        set_along_rates(optimizer, model, built)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == LR


class KeepsItsGroups(torch.optim.Optimizer):
    """An optimizer around another one, with groups of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], {})
        self.optimizer = inner


def test_a_wrapper_with_other_groups_is_refused_and_left_as_it_was() -> None:
    inner = torch.optim.AdamW(trainable(model := network()), lr=LR, weight_decay=0.1)
    with pytest.raises(PaCAError, match="KeepsItsGroups keeps groups of its own"):
        set_along_rates(KeepsItsGroups(inner), model, [])
    assert [(group["lr"], group["weight_decay"]) for group in inner.param_groups] == [(LR, 0.1)]


def test_mistakes_are_named() -> None:
    model = network()
    optimizer = torch.optim.AdamW(trainable(model), lr=LR)
    schedules.StepLR(optimizer, 3)
    with pytest.raises(PaCAError, match=r"attach\(optimizer, model\) before the schedule"):
        attach(optimizer, model)
    with pytest.raises(PaCAError, match=r"norms_lr=0\.5 is of norms that are trained along: set train_norms=True"):
        PaCAConfig(norms_lr=0.5)
    for value in (0, -1, float("nan"), "half", True):
        with pytest.raises(PaCAError, match="norms_lr must be a positive number"):
            PaCAConfig(train_norms=True, norms_lr=value)  # type: ignore[arg-type]
