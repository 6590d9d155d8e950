"""What a run has seen: tokens, and the loss since it was last asked for. Counted on the device, without waiting."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paca_lightning.core.tokens import count_tokens

WITHOUT_DOUBLES = ("mps", "hpu")


class TrainingCounts:
    """Counts the batches of a training, on each rank for itself until they are gathered.

    Attributes:
        tokens: Tokens that were not padding, of all ranks, up to when they were last gathered; None if unknown, as of
            batches without ``input_ids``.
    """

    def __init__(self) -> None:
        self.tokens: int | None = 0
        self._loss: float | None = 0.0  # summed over steps, mean over ranks; None: a step had none
        self._steps = 0
        self._own: tuple[Tensor | int, Tensor | float] = (0, 0.0)  # tokens and losses that are not gathered yet

    def add(self, batch: Any, outputs: Any, *, stepped: bool) -> None:
        """Count a batch.

        Args:
            batch: Of this rank.
            outputs: What ``training_step`` returned. Lightning has divided its loss by the number of micro-batches.
            stepped: Whether an optimizer step followed.
        """
        tokens, losses = self._own
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            tokens = tokens + count_tokens(batch)
        else:
            self.tokens = None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            wide = torch.float32 if loss.device.type in WITHOUT_DOUBLES else torch.float64
            losses = losses + loss.detach().to(wide)
        else:
            self._loss = None
        self._own = (tokens, losses)
        self._steps += stepped

    def gather(self) -> None:
        """Add what the ranks have counted. Collective; waits for the device."""
        own = (int(self._own[0]), float(self._own[1]))
        ranks = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            ranks = [own] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        if self.tokens is not None:
            self.tokens += sum(tokens for tokens, _ in ranks)
        if self._loss is not None:
            self._loss += sum(loss for _, loss in ranks) / len(ranks)
        self._own = (0, 0.0)

    def take_mean_loss(self) -> float | None:
        """The mean loss of the steps since this was last called; None without steps, a loss, or a finite one.

        Call :meth:`gather` before.
        """
        mean = None if self._loss is None or not self._steps else self._loss / self._steps
        self._loss, self._steps = 0.0, 0
        return mean if mean is not None and math.isfinite(mean) else None

    def state_dict(self) -> dict[str, Any]:
        """What is gathered."""
        return {"tokens": self.tokens, "loss": self._loss, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.tokens, self._loss, self._steps = state_dict["tokens"], state_dict["loss"], state_dict["steps"]
        self._own = (0, 0.0)
