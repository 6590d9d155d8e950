"""The rows that a history is measured on: sets by name, the same at each step."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.loader import ResumableLoader
from paca_lightning.tasks.data.new_tokens import give_new_tokens, new_tokens_of
from paca_lightning.tasks.data.split import TokenizedSplit
from paca_lightning.tasks.instruction import InstructionDataModule

TRAIN, HELD_OUT = "train", "held-out"


@dataclass(frozen=True)
class RowSet:
    """Rows under a name.

    Attributes:
        name: For tables and plots.
        split: The rows.
        total: How many there were before ``--limit``.
        datamodule: Makes their batches as it makes those of an evaluation.
    """

    name: str
    split: TokenizedSplit
    total: int
    datamodule: InstructionDataModule

    def batches(self) -> ResumableLoader:
        """Their batches, as a validation of the run would have them."""
        self.datamodule.splits["test"] = self.split
        return self.datamodule.test_dataloader()

    def token_rows(self) -> list[dict[str, Any]]:
        """Each row's ``input_ids`` and whether each is ``trained``."""
        return list(self.split.dataset.select_columns(["input_ids", "trained"]))

    def describe(self) -> str:
        """How many rows there are, as words."""
        count = len(self.split.dataset)
        return f"{count:,} rows" if count == self.total else f"{count:,} of {self.total:,} rows, drawn at random"


def row_sets(datamodule: InstructionDataModule, files: dict[str, str], limit: int) -> list[RowSet]:
    """The training rows, the held-out rows if there are any, and those of further files.

    Args:
        datamodule: Of the run.
        files: By name.
        limit: Most rows of each set; 0: all.

    Raises:
        PaCAError: If a file cannot be used.
    """
    datamodule.setup("fit")
    splits = {TRAIN: datamodule.splits["train"]}
    if "validation" in datamodule.splits:
        splits[HELD_OUT] = datamodule.splits["validation"]
    for name, file in files.items():
        settings = dict(datamodule.hparams) | {"test": file, "test_split": "train"}
        other = InstructionDataModule(**{key: value for key, value in settings.items() if not key.startswith("_")})
        give_new_tokens(other, new_tokens_of(datamodule))
        other.setup("test")
        splits[name] = other.splits["test"]
    return [RowSet(name, drawn(split, limit), len(split.dataset), datamodule) for name, split in splits.items()]


def drawn(split: TokenizedSplit, limit: int) -> TokenizedSplit:
    """At most so many rows of a split, drawn at random but always the same; 0: all."""
    count = len(split.dataset)
    if limit == 0 or count <= limit:
        return split
    return split.select(np.sort(np.random.default_rng(0).permutation(count)[:limit]))


def parse_files(given: list[str]) -> dict[str, str]:
    """``NAME=FILE`` options as a dictionary.

    Raises:
        PaCAError: If one is of another form, or a name is taken.
    """
    files: dict[str, str] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not (name and equals and file) or "," in name:
            raise PaCAError(f"--rows {text!r}: give a name and a file, such as --rows facts=facts.jsonl.")
        if name in (TRAIN, HELD_OUT, *files):
            raise PaCAError(f"--rows {text!r}: there is a set {name!r} already. Give another name.")
        files[name] = file
    return files
