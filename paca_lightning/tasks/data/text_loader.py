"""Reads and pads batches of texts for a resumable loader."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.data.ragged import Ragged, padded, padded_width, padding_mask
from paca_lightning.tasks.data.sampler import Batch
from paca_lightning.tasks.data.text_encoding import EncodedTexts


@dataclass(frozen=True)
class TextSplit:
    """A split as tokens and labels.

    Attributes:
        location: Where it comes from, in words.
        texts: The texts of the rows by name: one for classification, two or three for embeddings.
        labels: Classes (rows,) int64, numbers (rows,) or (rows, labels) float32, or one for each token; None without.
        dropped: Bad rows that were left out.
    """

    location: str
    texts: dict[str, EncodedTexts]
    labels: np.ndarray | Ragged | None = None
    dropped: int = field(default=0, kw_only=True)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's longest text."""
        lengths: np.ndarray = np.maximum.reduce([one.input_ids.lengths for one in self.texts.values()])
        return lengths

    @property
    def items(self) -> np.ndarray:
        """How many items with a loss each row has: its labelled words, or one."""
        if isinstance(self.labels, Ragged):
            return np.array([int((self.labels[row] != IGNORE_INDEX).sum()) for row in range(len(self.labels))])
        return np.ones(len(self), np.int64)

    def describe(self, name: str) -> str:
        """How many rows there are and how many were cut, as a sentence."""
        cut = sum(one.truncated for one in self.texts.values())
        dropped = f"; {self.dropped:,} bad rows dropped" if self.dropped else ""
        return f"{name}: {len(self):,} rows from {self.location} ({cut:,} texts cut to max_length{dropped})"


class TextReader(torch.utils.data.Dataset[dict[str, dict[str, Tensor]]]):
    """Reads a batch of rows as padded tensors: a batch of inputs for each text, and the labels.

    Args:
        split: The rows.
        pad_token_id: Fills ``input_ids`` behind a text.
        pad_to_multiple_of: Texts are padded to a multiple of this length, up to ``max_length``.
        max_length: The limit.
    """

    def __init__(self, split: TextSplit, pad_token_id: int, pad_to_multiple_of: int, max_length: int) -> None:
        self._split = split
        self._pad, self._multiple, self._limit = pad_token_id, pad_to_multiple_of, max_length

    def __getitems__(self, batch: Batch) -> dict[str, dict[str, Tensor]]:  # torch's fetcher passes the whole batch
        """The batch by the names of its texts; of one text, with ``labels``."""
        numbers = batch.documents
        result = {name: self._inputs(one, numbers) for name, one in self._split.texts.items()}
        labels = self._split.labels
        if labels is not None:
            (inputs,) = result.values()
            inputs["labels"] = self._labels(labels, numbers, batch.repeated, inputs["input_ids"].shape[1])
        elif batch.repeated:  # nothing of another rank's row may be trained
            for inputs in result.values():
                inputs["repeated"] = torch.ones(len(numbers), dtype=torch.bool)
        return result

    def _inputs(self, texts: EncodedTexts, numbers: np.ndarray) -> dict[str, Tensor]:
        rows = [texts.input_ids[number] for number in numbers]
        width = padded_width(max(map(len, rows)), self._multiple, self._limit)
        inputs = {"input_ids": padded(rows, self._pad, width)}
        if (mask := padding_mask(rows, width)) is not None:
            inputs["attention_mask"] = mask
        if texts.token_type_ids is not None:
            inputs["token_type_ids"] = padded([texts.token_type_ids[number] for number in numbers], 0, width)
        return inputs

    def _labels(self, labels: np.ndarray | Ragged, numbers: np.ndarray, repeated: bool, width: int) -> Tensor:
        """The labels; of a repeated batch, none."""
        if isinstance(labels, Ragged):
            result = padded([labels[number] for number in numbers], IGNORE_INDEX, width)
        else:
            result = torch.from_numpy(labels[numbers])
        if repeated:
            result = torch.full_like(result, float("nan") if result.is_floating_point() else IGNORE_INDEX)
        return result
