"""What is measured of a head's predictions over a whole split, on all processes."""

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, PearsonCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelF1Score,
)

from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.new_heads import HeadTask


class Scores:
    """The metrics of a task since they were built: accuracy and macro F1, or mean squared error and Pearson's r.

    No module, so that no strategy casts or shards its sums.

    Args:
        task: The task.
        labels: Number of labels.
        device: Where predictions are.
    """

    def __init__(self, task: HeadTask, labels: int, device: torch.device) -> None:
        self.task = task
        metrics: dict[str, Metric]
        if task == "regression":
            metrics = {"mse": MeanSquaredError(), "pearson": PearsonCorrCoef()}
        elif task == "multi_label":
            metrics = {
                "accuracy": MultilabelAccuracy(labels, average="micro"),
                "f1": MultilabelF1Score(labels, average="macro"),
            }
        else:
            metrics = {
                "accuracy": MulticlassAccuracy(labels, average="micro", ignore_index=IGNORE_INDEX),
                "f1": MulticlassF1Score(labels, average="macro", ignore_index=IGNORE_INDEX),
            }
        self.metrics = {name: metric.set_dtype(torch.float32).to(device) for name, metric in metrics.items()}

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: Shape (..., labels).
            labels: Classes (...), -100 where there is none; or numbers (..., labels) or (...), NaN where there is none.
        """
        if self.task in ("sequence", "tokens"):
            predicted, wanted = logits.argmax(-1).flatten(), labels.flatten()
        else:
            logits = logits.float().flatten(1)
            labels = labels.reshape(logits.shape)
            there = ~labels.isnan().any(-1)
            predicted, wanted = logits[there], labels[there]
            if self.task == "regression":
                predicted, wanted = predicted.flatten(), wanted.flatten()
            else:
                predicted, wanted = (predicted > 0).long(), wanted.long()
        if len(wanted):
            for metric in self.metrics.values():
                metric.update(predicted, wanted)

    def compute(self) -> dict[str, Tensor]:
        """The metrics by name, equal on all processes."""
        return {name: metric.compute() for name, metric in self.metrics.items()}
