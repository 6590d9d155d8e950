"""A tokenized split: its documents, where they come from, and what became of its rows."""

from dataclasses import dataclass, field, replace

import numpy as np
from datasets import Dataset

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.report import SplitReport


@dataclass(frozen=True)
class TokenizedSplit:
    """A tokenized split.

    Args:
        name: train, validation or test.
        location: Where its rows come from, in words.
        dataset: The documents, as `tokenization.tokenized` returns them.
        dropped: Conversations dropped because truncation left no token to train.
        locations: The files or other parts of the source, by number.
        report: Bad rows, fields that nothing used, and what the chat template did.
    """

    name: str
    location: str
    dataset: Dataset
    dropped: int
    locations: tuple[str, ...]
    report: SplitReport = field(default_factory=SplitReport)

    def column(self, name: str) -> np.ndarray:
        """A column with one number per conversation, such as `length`."""
        return np.asarray(self.dataset.select_columns(name).with_format("numpy")[:][name])

    def files(self) -> list[str]:
        """The file of each conversation."""
        return [self.locations[number] for number in self.column("file")]

    def select(self, keep: np.ndarray) -> "TokenizedSplit":
        """The conversations for which `keep` (conversations,) is True, or those of these numbers."""
        numbers = np.flatnonzero(keep) if keep.dtype == bool else keep
        return replace(self, dataset=self.dataset.select(numbers, keep_in_memory=True))

    def describe(self) -> str:
        """How many conversations there are, and how many were cut or dropped, as a sentence."""
        truncated = int(self.column("truncated").sum())
        return (
            f"{self.name}: {len(self.dataset):,} conversations from {self.location} ({truncated:,} cut to max_length; "
            f"{self.dropped:,} dropped, as nothing of an answer was left of them)"
        )

    def hold_out(self, fraction: float, seed: int) -> tuple["TokenizedSplit", "TokenizedSplit"]:
        """Split it into what is trained and a validation split, drawn by seed.

        Rows are drawn, not conversations, as paths through one message tree share their first turns.

        Raises:
            PaCAError: One of them would be empty.
        """
        numbers = self.column("row").astype(np.int64)
        numbers += self.column("file") * (numbers.max() + 1)
        rows, conversation_rows = np.unique(numbers, return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(rows))
        held_out = np.zeros(len(rows), dtype=bool)
        held_out[order[: round(len(rows) * fraction)]] = True
        if held_out.all() or not held_out.any():
            raise PaCAError(
                f"validation_fraction {fraction} of the {len(rows)} rows of {self.location} leaves the training or the "
                "validation split empty."
            )
        in_validation = held_out[conversation_rows]
        report = SplitReport(formats=self.report.formats)
        validation = replace(self.select(in_validation), name="validation", dropped=0, report=report)
        return self.select(~in_validation), validation
