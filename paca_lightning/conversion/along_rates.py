"""Rates of norms that are trained along (``norms_lr``) and of new tokens' rows: groups of their own, also in schedules.

A group has one learning rate, and a schedule keeps the rates of each group from when it was built. So the group is
split, and each schedule gets what it would have, had it been built on the split groups.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paca_lightning.conversion.optimizers import optimizers_within
from paca_lightning.conversion.state import config_of
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import note_last_rates, parts_of_schedule
from paca_lightning.layers.along import along_names
from paca_lightning.layers.rows import row_modules

ALONG_GROUP = "paca_along"
"""Key of a parameter group whose rate was set: it is saved with the group, so that resuming does not set it again."""

ROWS_GROUP = "paca_new_rows"
"""The same key of a group of rows of new tokens."""

RATES_OF_GROUP = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Learning rates in a group: the present one, and those that schedules note there (OneCycleLR, SWALR)."""

RATES_OF_SCHEDULE = ("base_lrs", "max_lrs", "min_lrs")
BESIDE_RATES = ("lr_lambdas", "base_momentums", "max_momentums")
"""Lists with an entry for each group in the schedules of PyTorch: learning rates, and others."""


def along_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The norms and biases of a model that are trained along."""
    return [module.get_parameter(name) for module in model.modules() for name in along_names(module)]


@dataclass(frozen=True)
class _Kind:
    """Parameters without weight decay, which would pull them to zero.

    Attributes:
        name: For messages.
        key: Of their parameter groups.
        parameters: The ``id`` of each.
        factor: Of the optimizer's learning rate.
    """

    name: str
    key: str
    parameters: set[int]
    factor: float

    @property
    def wants(self) -> str:
        rate = f" along with norms_lr={self.factor:g} and" if self.key == ALONG_GROUP else ""
        return f"{self.name} are trained{rate} without weight decay"

    @property
    def instead(self) -> str:
        keep = "Leave norms_lr at 1 and set" if self.key == ALONG_GROUP else "Set"
        return f"{keep} weight_decay=0, or take another optimizer, such as AdamW."


def set_along_rates(
    optimizer: Optimizer, model: nn.Module, schedules: Sequence[Any] | None = None, *, may_split: bool = True
) -> None:
    """Give what is trained along its own learning rate, ``norms_lr`` times its group's, and no weight decay.

    Rows of new tokens keep their group's rate and have no weight decay either. A group of an optimizer that holds other
    parameters, too, is split: the new one comes last. A learning rate that a schedule has changed already, in a
    warm-up, is multiplied as it is, so it may differ by one rounding from that of an optimizer that was built with two
    groups. A group that has been set stays as it is, also after loading its state.

    Args:
        optimizer: Before its first step.
        model: The converted model.
        schedules: All schedules of the optimizer. None: they are not known, so there must be none yet.
        may_split: Whether the optimizer may get another group.

    Raises:
        PaCAError: If the optimizer or a schedule cannot have such a group. Nothing is changed then.
    """
    if (config := config_of(model)) is None:
        return
    rows = {id(module.paca_rows) for _, module in row_modules(model)}
    kinds = [
        _Kind("Norms and biases", ALONG_GROUP, set(map(id, along_parameters(model))), config.norms_lr),
        _Kind("Rows of new tokens", ROWS_GROUP, rows, 1.0),
    ]
    chain = optimizers_within(optimizer)
    groups = chain[0].param_groups
    affected = [(kind, _affected(groups, kind)) for kind in kinds]
    parts = [part for schedule in schedules or () for part in parts_of_schedule(schedule)]
    for kind, indices in affected:
        for index in indices:
            whole = all(id(parameter) in kind.parameters for parameter in groups[index]["params"])
            _check_group(chain[0], groups[index], kind, known=schedules is not None, fits=whole or may_split)
            apart = [type(outer).__name__ for outer in chain if outer.param_groups is not groups]
            if apart and not whole:
                raise PaCAError(f"{kind.wants}, and {apart[0]} keeps groups of its own. {kind.instead}")
        for part in parts if indices else ():
            _check_schedule(part, kind)
    for kind, indices in affected:
        for index in indices:
            position = _own_group(chain[0], groups[index], kind.parameters)
            _set_group(groups[position], kind)
            for part in parts:
                _set_schedule(part, index, position, kind.factor)
        for part in parts if indices else ():
            note_last_rates(part, [group["lr"] for group in groups])


def _affected(groups: list[dict[str, Any]], kind: _Kind) -> list[int]:
    """Positions of the groups with parameters of a kind, unless they are as these need it."""
    return [
        index
        for index, group in enumerate(groups)
        if any(id(parameter) in kind.parameters for parameter in group["params"])
        and kind.key not in group
        and (kind.factor != 1 or group.get("weight_decay"))
    ]


def _check_group(optimizer: Optimizer, group: dict[str, Any], kind: _Kind, *, known: bool, fits: bool) -> None:
    name, factor = type(optimizer).__name__, kind.factor
    if not known and "initial_lr" in group:
        raise PaCAError(
            f"{kind.wants}, so {name} gets another parameter group, and it has a schedule already. Call "
            "attach(optimizer, model) before the schedule is built."
        )
    if not fits:
        raise PaCAError(
            f"{kind.wants}, which needs a parameter group of their own, and {name} has them beside other "
            "parameters. Build it with a group of just them."
        )
    if isinstance(optimizer, LBFGS) or hasattr(optimizer, "consolidate_state_dict"):  # ZeroRedundancyOptimizer
        raise PaCAError(f"{kind.wants}, and {name} cannot be given another parameter group. {kind.instead}")
    # Adafactor, and D-Adaptation with its kin
    if factor != 1 and (group["lr"] is None or {"d", "growth_rate"} <= group.keys()):
        raise PaCAError(
            f"norms_lr={factor:g} is a fraction of the learning rate, and {name} finds its own. {kind.instead}"
        )


def _check_schedule(schedule: Any, kind: _Kind) -> None:
    name, factor = type(schedule).__name__, kind.factor
    if not isinstance(schedule, LRScheduler):
        raise PaCAError(
            f"{kind.wants}, in a parameter group that {name} was not built with, and it is no LRScheduler of "
            "PyTorch. Use one, or leave norms_lr at 1 and set weight_decay=0."
        )
    if factor != 1 and (least := getattr(schedule, "eta_min", 0)):
        raise PaCAError(
            f"norms_lr={factor:g} is a fraction of the learning rate, and {name}(eta_min={least}) ends at the same "
            "rate for all. Use eta_min=0, or paca_lightning.tasks.schedules.CosineSchedule(min_ratio=...)."
        )


def _own_group(optimizer: Optimizer, group: dict[str, Any], along: set[int]) -> int:
    """Position of a group that holds what is trained along from ``group``, and nothing else: itself, or a new one."""
    groups = optimizer.param_groups
    kept = [id(parameter) not in along for parameter in group["params"]]
    if not any(kept):
        return next(index for index, other in enumerate(groups) if other is group)
    named = "param_names" in group
    items = list(zip(group["param_names"], group["params"], strict=True)) if named else list(group["params"])
    split = {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "param_names")}
    for name in ("params", "param_names")[: 1 + named]:
        group[name] = [item for item, keep in zip(group[name], kept, strict=True) if keep]
    split["params"] = [item for item, keep in zip(items, kept, strict=True) if not keep]
    optimizer.add_param_group(split)
    return len(groups) - 1


def _set_group(group: dict[str, Any], kind: _Kind) -> None:
    for name in RATES_OF_GROUP:
        if group.get(name) is not None and kind.factor != 1:
            group[name] = _scaled(group[name], kind.factor)
    if group.get("weight_decay"):
        group["weight_decay"] = 0.0
    group[kind.key] = True


def _set_schedule(schedule: LRScheduler, source: int, position: int, factor: float) -> None:
    """Give a schedule the entries of a group that came from another one, which may be the same."""
    for name in (*RATES_OF_SCHEDULE, *BESIDE_RATES):
        if isinstance(entries := getattr(schedule, name, None), list):
            entry = _scaled(entries[source], factor) if name in RATES_OF_SCHEDULE else entries[source]
            entries[position : position + 1] = [entry]


def _scaled(rate: float | Tensor, factor: float) -> float | Tensor:
    """A rate times a factor; a tensor is a new one, which the group does not share."""
    return rate * factor
