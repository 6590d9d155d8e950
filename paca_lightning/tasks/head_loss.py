"""The losses of heads over labels."""

import torch.nn.functional as F
from torch import Tensor

from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.new_heads import HeadTask


def head_loss(task: HeadTask, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of what has a label, and its number, an int64 scalar.

    Args:
        task: The task.
        logits: Shape (..., labels).
        labels: As :class:`~paca_lightning.tasks.ClassifierModule` says.
    """
    logits = logits.float()
    if task in ("sequence", "tokens"):
        flat = labels.flatten()
        total = F.cross_entropy(logits.flatten(0, -2), flat, ignore_index=IGNORE_INDEX, reduction="sum")
        return total, (flat != IGNORE_INDEX).sum()
    labels = labels.reshape(logits.shape)
    there = ~labels.isnan().any(-1)
    wanted = labels.nan_to_num()  # a NaN times 0 would be NaN
    each = (
        (logits - wanted).square()
        if task == "regression"
        else F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    )
    return (each.mean(-1) * there).sum(), there.sum()
