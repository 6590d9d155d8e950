"""The share of held-out answers that the model gives word by word."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.batch import IGNORE_INDEX


class ExactAnswers(Callback):
    """Logs ``val/accuracy``: the share of validation rows whose trained tokens are all the model's first choice.

    It is what greedy decoding would answer exactly, as each token is then the same as in the row, at the cost of one
    more forward pass of the validation rows. It suits short answers: a choice, a name, a number. Rows without trained
    tokens are not counted.

    Raises:
        PaCAError: If the rows are packed, as several answers are then one row.
    """

    def __init__(self) -> None:
        self._share = MeanMetric()

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validation before."""
        self._share = MeanMetric().to(pl_module.device)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the rows of a batch."""
        if "position_ids" in batch:
            raise PaCAError("ExactAnswers judges one answer a row, and packed rows hold several: set packing: false.")
        with torch.no_grad():
            right, counted = exact_rows(pl_module(batch), batch["labels"])
        self._share.update(right.float(), weight=counted.float())

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share over all processes."""
        pl_module.log("val/accuracy", self._share.compute(), prog_bar=True, sync_dist=True)


def exact_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows' trained tokens are all predicted.

    Args:
        logits: Shape (B, T, V).
        labels: Shape (B, T), aligned with the inputs, -100 where not trained.

    Returns:
        Whether each row is right, and whether it has a trained token at all: both shape (B,) bool.
    """
    trained = labels[:, 1:] != IGNORE_INDEX
    hit = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return (hit | ~trained).all(1), trained.any(1)
