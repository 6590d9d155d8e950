"""Checks the names of monitored metrics once the sanity validation has logged what there is."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from paca_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from paca_lightning.core.errors import PaCAError

OF_LIGHTNING = ("epoch", "step")
OF_VALIDATION = ("val", "valid", "validation", "eval", "test")
"""How names of metrics begin that training does not log."""
SIMILAR = 0.7


def check_monitors(trainer: Trainer) -> None:
    """Compare monitored names with the metrics of the sanity validation.

    A name that training logs is not there yet. So a missing name is an error where it begins as those of the
    validation do (``val/los``) or resembles one (``eval_loss``), and otherwise a warning, unless it begins with
    ``train``.

    Raises:
        PaCAError: If a monitored metric is no validation metric, though its name is like theirs.
    """
    metrics = sorted(trainer.callback_metrics)
    if not metrics:
        return
    beginnings = {_beginning(name) for name in metrics}
    for owner, monitor in _monitored(trainer):
        if monitor in metrics or monitor in OF_LIGHTNING or _beginning(monitor) == "train":
            continue
        similar = difflib.get_close_matches(monitor, metrics, n=1, cutoff=SIMILAR)
        message = f"{owner}(monitor={monitor!r}): validation logs no such metric. It logs {_listed(metrics)}."
        if similar or _beginning(monitor) in beginnings:
            raise PaCAError(message + (f" Did you mean {similar[0]!r}?" if similar else ""))
        rank_zero_warn(f"{message} Unless training logs it, the run will stop where it is needed.")


def check_validation_comes(trainer: Trainer) -> None:
    """Compare what is monitored with whether validation runs at all, before the first step.

    Raises:
        PaCAError: If EarlyStopping waits for a metric of validation, and the run has none or ends before its first.
    """
    if (missing := without_validation(trainer)) is None:
        return
    for owner, monitor in _monitored(trainer):
        if _beginning(monitor) not in OF_VALIDATION:
            continue
        message = f"{owner}(monitor={monitor!r}): {missing}, so nothing logs this metric."
        if owner == EarlyStopping.__name__:
            raise PaCAError(f"{message} Validate earlier (trainer.val_check_interval), or leave the callback out.")
        rank_zero_warn(message)


def without_validation(trainer: Trainer) -> str | None:
    """Why a run does not validate, in words; None if it does, or it is not known."""
    if trainer.global_step:
        return None
    if not trainer.enable_validation or not sum(trainer.num_val_batches):
        return "the run has no validation data"
    batches, interval = float(trainer.num_training_batches), trainer.val_check_batch
    if interval is None or math.isinf(interval):  # by the clock, or where an epoch of unknown length ends
        return None
    ends: list[float] = [trainer.max_steps * trainer.accumulate_grad_batches] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * batches)
    epochs_before = (trainer.check_val_every_n_epoch or 1) - 1
    first = interval + (epochs_before * batches if epochs_before else 0)
    if min(ends, default=math.inf) < first:
        return f"the run ends after {min(ends):g} batches, and its first validation comes after {first:g}"
    return None


def _monitored(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """What monitors a metric, and which."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        strict = isinstance(callback, ModelCheckpoint | AdapterCheckpoint)
        strict |= isinstance(callback, EarlyStopping) and callback.strict
        if strict and callback.monitor is not None:
            yield type(callback).__name__, callback.monitor
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.strict and config.monitor is not None:
            yield type(config.scheduler).__name__, config.monitor


def _beginning(name: str) -> str:
    return re.split(r"[^a-z0-9]", name.lower(), maxsplit=1)[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
