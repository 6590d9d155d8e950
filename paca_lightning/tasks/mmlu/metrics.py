"""Counts right answers by subject, exactly on any number of processes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from paca_lightning.tasks.mmlu.questions import Question
from paca_lightning.tasks.mmlu.subjects import SUBJECTS


class MMLUAccuracy(Metric):
    """Accuracy on a fixed list of questions. Each counts once, however many processes score it.

    The state is the choice made for each question, not a sum. So neither the padding of a distributed sampler nor
    tensor-parallel copies of a process count a question twice.

    Args:
        questions: The questions; a row is a position in this list.
        **kwargs: Settings of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    choices: Tensor  # (N,): 0 to 3, or -1 if not answered yet

    def __init__(self, questions: Sequence[Question], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("choices", torch.full((len(questions),), -1), dist_reduce_fx="max")
        self._answers = torch.tensor([question.answer for question in questions])
        self._subjects = torch.tensor([SUBJECTS.index(str(question.subject)) for question in questions])

    def update(self, rows: Sequence[int], choices: Tensor) -> None:
        """Store the choices (B,) made for the questions at these rows."""
        self.choices[torch.as_tensor(rows, device=self.choices.device)] = choices.to(self.choices)

    def compute(self) -> dict[str, Tensor]:
        """Counts by subject, for :func:`~paca_lightning.tasks.mmlu.accuracy.score_groups`.

        Returns:
            ``correct`` and ``questions`` (those answered so far), int64 of shape (57,), in the order of ``SUBJECTS``.
        """
        choices = self.choices.cpu()
        answered = choices >= 0
        questions = torch.bincount(self._subjects[answered], minlength=len(SUBJECTS))
        correct = torch.bincount(self._subjects[answered & (choices == self._answers)], minlength=len(SUBJECTS))
        return {"correct": correct, "questions": questions}
