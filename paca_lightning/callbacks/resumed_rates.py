"""Gives a resumed run the learning rates of its config, in the place of the checkpoint's."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import note_last_rates, parts_of_schedule

OF_FIXED_RATES = (OneCycleLR, CyclicLR, SWALR, ReduceLROnPlateau)
"""Schedules with rates beside the first one, or which do not keep the first one."""
INSTEAD = "Leave resume_lr at 'checkpoint', or begin a new run from the adapter: adapter=..."


def first_rate(group: dict[str, Any]) -> float | None:
    """The learning rate of a parameter group before a schedule scales it; None where the optimizer chooses it."""
    rate = group.get("initial_lr", group["lr"])
    return None if rate is None else float(rate)


def schedules_of(optimizer: Optimizer, trainer: Trainer) -> list[LRScheduler]:
    """The schedules of an optimizer, with the schedules that they consist of."""
    configured = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [part for one in configured if one.optimizer is optimizer for part in parts_of_schedule(one)]


def apply_rates(trainer: Trainer, rates: Sequence[float | None]) -> list[tuple[float, float]]:
    """Give each parameter group a new first learning rate, at the position that its schedule has reached.

    The present rate is multiplied by new rate / old rate. A schedule goes on from there: it is taken to be proportional
    to its first rate, as those of PyTorch are that are not refused.

    Args:
        trainer: Of a run whose checkpoint is restored.
        rates: The first learning rate of each group of all optimizers.

    Returns:
        The old and the new rate, of the groups whose rate has changed.

    Raises:
        PaCAError: If the rates that follow from a new first rate are not defined. Nothing is changed then.
    """
    groups = [(group, optimizer) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    changes = []
    for (group, optimizer), new in zip(groups, rates, strict=True):
        schedules = schedules_of(optimizer, trainer)
        for schedule in schedules:
            _check_proportional(schedule)
        old = first_rate(group) if schedules else group["lr"]
        if old != new:
            if not old or new is None or (schedules and "initial_lr" not in group):
                raise PaCAError(f"resume_lr='config' cannot go from learning rate {old} to {new}. {INSTEAD}")
            changes.append((group, float(old), new))
    for group, old, new in changes:
        group["lr"] = _scaled(group["lr"], old, new)
        if "initial_lr" in group:
            group["initial_lr"] = new
    for optimizer in trainer.optimizers:
        present = [group["lr"] for group in optimizer.param_groups]
        for schedule in schedules_of(optimizer, trainer):
            if hasattr(schedule, "base_lrs"):  # ChainedScheduler has none
                schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            note_last_rates(schedule, present)
    return [(old, new) for _, old, new in changes]


def _check_proportional(schedule: LRScheduler) -> None:
    name = type(schedule).__name__
    if isinstance(schedule, OF_FIXED_RATES):
        raise PaCAError(f"resume_lr='config' cannot change the learning rates of {name}. {INSTEAD}")
    if least := getattr(schedule, "eta_min", 0):
        raise PaCAError(
            f"resume_lr='config' cannot change the learning rates of {name}(eta_min={least}), which lie above a fixed "
            f"one. {INSTEAD}"
        )


def _scaled(rate: float | Tensor, old: float, new: float) -> float | Tensor:
    """A rate times new / old; exactly ``new`` for the old rate. A tensor stays the same object."""
    if isinstance(rate, Tensor):
        return rate.mul_(new / old)
    return new if rate == old else rate * (new / old)
