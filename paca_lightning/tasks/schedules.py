"""Learning-rate schedules with a warm-up, planned over the optimizer steps of a run.

A config names a schedule without the length of the run, which :func:`planned` takes from the trainer. The curves equal
those of the Hugging Face schedules of the same names; docs/decisions/0014-learning-rate-schedules.md says why they are
computed here.
"""

import math
from abc import abstractmethod
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from paca_lightning.core.errors import PaCAError


class WarmupSchedule(LRScheduler):
    """A learning rate that rises linearly during the warm-up, then follows :meth:`decay`.

    Step ``s`` of a warm-up of ``w`` steps, counted from 0, has ``(s + 1) / (w + 1)`` of the full learning rate: no step
    is taken with a rate of 0, and the first one after the warm-up is the first with the full rate.

    Args:
        optimizer: The optimizer whose learning rates are scaled.
        warmup_ratio: Length of the warm-up as a fraction of all optimizer steps, rounded up.
        warmup_steps: Length of the warm-up in optimizer steps. Give this or the ratio, not both.
        total_steps: Optimizer steps of the run. Default: what :meth:`plan` is told before training.

    Raises:
        PaCAError: If the warm-up is given twice or is out of range, or at the second step if the length of the run is
            needed and unknown.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        if not 0 <= warmup_ratio <= 1:
            raise PaCAError(f"warmup_ratio must lie between 0 and 1, not {warmup_ratio!r}. For steps use warmup_steps.")
        if warmup_steps is not None and warmup_ratio:
            raise PaCAError(f"Give warmup_ratio={warmup_ratio} or warmup_steps={warmup_steps}, not both.")
        if warmup_steps is not None and warmup_steps < 0:
            raise PaCAError(f"warmup_steps must not be negative, but is {warmup_steps}.")
        self.warmup_ratio = warmup_ratio
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        super().__init__(optimizer)

    @property
    def needs_length(self) -> bool:
        """Whether the learning rates depend on the length of the run."""
        return True

    def plan(self, total_steps: int) -> None:
        """Set the number of optimizer steps of the run, before the first of them."""
        self.total_steps = total_steps
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """The position in the run, without the constructor's settings, so that a resumed run may be longer."""
        settings = ("warmup_ratio", "warmup_steps", "total_steps", "min_ratio")
        return {name: value for name, value in super().state_dict().items() if name not in settings}

    def get_lr(self) -> list[float | Tensor]:
        """Learning rate of each parameter group at the current step."""
        if self.total_steps is None and self.needs_length:
            if self.last_epoch > 0:
                raise PaCAError(f"{type(self).__name__} has no total_steps. Pass it, or call plan() before training.")
            return list(self.base_lrs)
        factor = self._factor(self.last_epoch, self.total_steps or 0)
        return [base * factor for base in self.base_lrs]

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up in a run of some length."""
        return math.ceil(self.warmup_ratio * total_steps) if self.warmup_steps is None else self.warmup_steps

    def _factor(self, step: int, total_steps: int) -> float:
        """Learning rate at a step over the full one."""
        warmup = self.warmup(total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.decay(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Factor of the learning rate after the warm-up; progress runs from 0 to 1 at the end of the run."""


class ConstantSchedule(WarmupSchedule):
    """Warm-up, then the full learning rate. Only a warm-up by ratio needs the length of the run."""

    @property
    def needs_length(self) -> bool:
        """Whether the warm-up is a fraction of the run."""
        return self.warmup_ratio > 0

    def decay(self, progress: float) -> float:
        """Always 1."""
        return 1.0


class DecayingSchedule(WarmupSchedule):
    """Warm-up, then a curve down to a fraction of the full learning rate.

    Args:
        *args: Parameters of :class:`WarmupSchedule`.
        min_ratio: Learning rate at the end of the run over the full one.
        **kwargs: Parameters of :class:`WarmupSchedule`.

    Raises:
        PaCAError: As :class:`WarmupSchedule`, or if ``min_ratio`` is out of range.
    """

    def __init__(self, optimizer: Optimizer, *, min_ratio: float = 0.0, **kwargs: Any) -> None:
        if not 0 <= min_ratio <= 1:
            raise PaCAError(f"min_ratio must lie between 0 and 1, not {min_ratio!r}.")
        self.min_ratio = min_ratio
        super().__init__(optimizer, **kwargs)

    def decay(self, progress: float) -> float:
        """1 at the end of the warm-up, ``min_ratio`` at the end of the run."""
        return self.min_ratio + (1 - self.min_ratio) * self.curve(progress)

    @abstractmethod
    def curve(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""


class LinearSchedule(DecayingSchedule):
    """Warm-up, then a straight line down to 0, or to ``min_ratio`` of the full learning rate."""

    def curve(self, progress: float) -> float:
        """A straight line."""
        return 1 - progress


class CosineSchedule(DecayingSchedule):
    """Warm-up, then half a cosine down to 0, or to ``min_ratio`` of the full learning rate."""

    def curve(self, progress: float) -> float:
        """Half a cosine."""
        return 0.5 * (1 + math.cos(math.pi * progress))


def planned(scheduler: LRScheduler | ReduceLROnPlateau, trainer: Trainer) -> LRSchedulerConfigType:
    """Lightning's configuration of a schedule; one of ours is told the length of the run.

    A schedule that does not fit the length of the run is named before the run starts.

    Args:
        scheduler: Any schedule. ``ReduceLROnPlateau`` follows ``val/loss``; others step after each optimizer step.
        trainer: The trainer of the run.

    Raises:
        PaCAError: If the schedule needs the length of the run, and the run has no end, or if the schedule ends before
            the run and refuses further steps.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "monitor": "val/loss"}
    steps = trainer.estimated_stepping_batches
    if isinstance(scheduler, WarmupSchedule) and scheduler.total_steps is None and scheduler.needs_length:
        if math.isinf(steps):
            raise PaCAError("The schedule needs the length of the run: set the trainer's max_steps or max_epochs.")
        scheduler.plan(int(steps))
    if not math.isinf(steps):
        check_length(scheduler, int(steps))
    return {"scheduler": scheduler, "interval": "step"}


def check_length(scheduler: LRScheduler, steps: int) -> None:
    """Say where a schedule and its run differ in length.

    Args:
        scheduler: Of this module or of PyTorch.
        steps: Optimizer steps of the run.

    Raises:
        PaCAError: If the schedule ends before the run and refuses further steps, as OneCycleLR does.
    """
    name = type(scheduler).__name__
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        raise PaCAError(
            f"{name} is planned for {scheduler.total_steps} steps, and the run takes {steps}, which it refuses. Set "
            f"its total_steps to {steps}."
        )
    if isinstance(scheduler, WarmupSchedule) and 0 < steps <= (warmup := scheduler.warmup(scheduler.total_steps or 0)):
        rank_zero_warn(
            f"{name}: the warm-up takes {warmup} steps and the run {steps}, so it never reaches the full learning "
            "rate. Shorten warmup_steps or warmup_ratio, or train longer."
        )
    elif (planned_steps := _planned_steps(scheduler)) is not None and planned_steps > steps:
        rank_zero_warn(
            f"{name} is planned for {planned_steps} steps and the run takes {steps}, so it stops in the middle of its "
            "curve. Plan it for the length of the run."
        )


def _planned_steps(scheduler: LRScheduler) -> int | None:
    """Steps after which a schedule's curve ends, if it says so."""
    if isinstance(scheduler, SequentialLR | ChainedScheduler):
        return None
    lengths = (getattr(scheduler, name, None) for name in ("total_steps", "T_max", "total_iters"))
    return next((int(length) for length in lengths if length is not None), None)
