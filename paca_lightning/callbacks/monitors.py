"""Checks the names of monitored metrics once the sanity validation has logged what there is."""

import difflib
import re
from collections.abc import Iterable, Iterator

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from paca_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from paca_lightning.core.errors import PaCAError

OF_LIGHTNING = ("epoch", "step")
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
