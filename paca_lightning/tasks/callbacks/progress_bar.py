"""The progress bar of a run that ``max_steps`` ends."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, RichProgressBar
from typing_extensions import override


class EpochProgressBar(RichProgressBar):
    """Lightning's progress bar, with the true number of epochs where ``max_steps`` ends the run.

    Lightning 2.6 shows ``Epoch 1/-2`` there, as ``max_epochs`` is -1, and takes the optimizer steps left for batches
    also where gradients are accumulated. Here, the epochs are counted from ``max_steps`` and the length of an epoch;
    where that length is unknown or changes, only the epoch's own number is shown. One optimizer is assumed.
    The command line uses this bar unless a config names another.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps_done = 0  # optimizer steps when this epoch began or was resumed

    @property
    @override
    def total_train_batches(self) -> int | float:
        """Batches of the current epoch, up to the one that reaches ``max_steps``."""
        steps_per_epoch = self._steps_per_epoch()
        if steps_per_epoch is None:
            return super().total_train_batches
        steps_left = self.trainer.max_steps - self._steps_done // steps_per_epoch * steps_per_epoch
        return min(self.trainer.num_training_batches, steps_left * self.trainer.accumulate_grad_batches)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_done = trainer.global_step
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_done = trainer.global_step
        super().on_train_epoch_start(trainer, pl_module)
        self._describe_epoch()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        resumed_in_mid_epoch = self.train_progress_bar_id is None  # Lightning makes the bar now
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if resumed_in_mid_epoch:
            self._describe_epoch()

    def _describe_epoch(self) -> None:
        """Replace Lightning's description of the training bar, unless ``max_epochs`` is the limit."""
        if self.trainer.max_epochs != -1 or self.progress is None or self.train_progress_bar_id is None:
            return
        steps_per_epoch = self._steps_per_epoch()
        if steps_per_epoch is None:
            description = f"Epoch {self.trainer.current_epoch}"
        else:
            last = (self.trainer.max_steps - 1) // steps_per_epoch
            description = f"Epoch {self._steps_done // steps_per_epoch}/{last}"
        description = description.ljust(len(self.validation_description))  # so that the bars stay aligned
        style = f"[{self.theme.description}]" if self.theme.description else ""
        self.progress.update(self.train_progress_bar_id, description=style + description)

    def _steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch of a run that ``max_steps`` alone ends, if they are known."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        varying = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
        if trainer.max_epochs != -1 or trainer.max_steps < 1 or not batches or math.isinf(batches) or varying:
            return None
        return math.ceil(batches / trainer.accumulate_grad_batches)
