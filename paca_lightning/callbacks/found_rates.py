"""Norms that are trained along keep their fraction of a learning rate that Lightning's finder has found."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder

from paca_lightning.conversion.along_rates import ALONG_GROUP


def apply_to_found_rates(trainer: Trainer, factor: float) -> None:
    """Multiply the rate of norms where ``LearningRateFinder`` has just given all groups the same one.

    Args:
        trainer: Of a run, before its first step.
        factor: The setting ``norms_lr``.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        finder = callback.optimal_lr if isinstance(callback, LearningRateFinder) else None
        if finder is None or (found := finder.suggestion()) is None:
            continue
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            if ALONG_GROUP in group and group["lr"] == found:
                group["lr"] = factor * found
