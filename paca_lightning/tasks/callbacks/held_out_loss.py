"""The fall of the validation loss over a run."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from paca_lightning.core.errors import PaCAError


class HeldOutLoss(Callback):
    """Measures the validation loss before training, logs it at step 0, and prints how far it fell at the end.

    The loss before training comes from Lightning's sanity check, which this callback extends to the whole validation
    set. A run resumed from a checkpoint has no loss before training.

    Args:
        metric: Name of the logged validation loss.

    Raises:
        PaCAError: If the run has no validation, or the loss before training is NaN or infinite.
    """

    def __init__(self, metric: str = "val/loss") -> None:
        self.metric = metric
        self.before: float | None
        self.after: float | None
        self.steps: int

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Extend the sanity check to the whole validation set."""
        if stage != "fit":
            return
        self.before, self.after, self.steps = None, None, 0
        _check_validates(trainer.enable_validation)
        trainer.num_sanity_val_steps = float("inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the data module has a validation split, which only its loader tells."""
        _check_validates(bool(sum(trainer.num_val_batches)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the loss, and log the one before training, as Lightning does not log sanity checks."""
        if trainer.state.fn != "fit" or (trainer.sanity_checking and trainer.global_step > 0):
            return
        if self.metric not in trainer.callback_metrics:
            raise PaCAError(
                f"HeldOutLoss(metric={self.metric!r}): validation logged no such metric, but "
                f"{sorted(trainer.callback_metrics)}."
            )
        self.after = float(trainer.callback_metrics[self.metric])
        self.steps = trainer.global_step
        if trainer.sanity_checking:
            if not math.isfinite(self.after):
                raise PaCAError(
                    f"{self.metric} is {self.after} before training: the model's weights hold NaN or Inf, or overflow "
                    "in this precision (fp16 does in many models trained in bf16), or the module takes a mean over no "
                    "trained token (with batch_size=1, a rank may have a batch without any)."
                )
            self.before = self.after
            for logger in trainer.loggers:
                logger.log_metrics({self.metric: self.before}, step=0)
                logger.save()
            rank_zero_info(f"Held-out loss before training: {self.before:.4f}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print both losses and the fall in percent."""
        if self.after is None or self.steps == 0:
            rank_zero_info("Held-out loss: no validation ran after training began.")
        elif self.before is None:
            rank_zero_info(
                f"Held-out loss after {self.steps} steps: {self.after:.4f} (a resumed run measures none before)"
            )
        else:
            fall = 100 * (1 - self.after / self.before)
            direction = "down" if fall >= 0 else "up"
            rank_zero_info(
                f"Held-out loss: {self.before:.4f} before training, {self.after:.4f} after {self.steps} steps, "
                f"{direction} {abs(fall):.1f}%"
            )


def _check_validates(has_validation: bool) -> None:
    if not has_validation:
        raise PaCAError(
            "HeldOutLoss needs validation: give the data module a validation split, and do not set "
            "limit_val_batches=0. Or leave the callback out."
        )
