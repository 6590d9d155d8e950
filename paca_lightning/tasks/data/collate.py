"""Collates tokenized documents into a padded batch, without a Python loop over tokens or rows."""

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.data.ragged import padded_width
from paca_lightning.tasks.data.sampler import Batch


class Documents(NamedTuple):
    """Concatenated documents: ids and whether each is trained (tokens,), lengths (documents,), `Batch.per_row`."""

    input_ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    per_row: np.ndarray


class DocumentReader(torch.utils.data.Dataset[Documents]):
    """Reads a batch of documents from memory-mapped Arrow as flat arrays.

    Args:
        dataset: With columns `input_ids` and `trained`, lists of equal length.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._table = dataset.select_columns(["input_ids", "trained"]).with_format("arrow")

    def __getitems__(self, batch: Batch) -> Documents:  # torch's fetcher passes the whole batch
        table = self._table[batch.documents]
        ids = table.column("input_ids").combine_chunks()
        trained = table.column("trained").combine_chunks()
        return Documents(
            ids.flatten().to_numpy(),
            trained.flatten().to_numpy(zero_copy_only=False) & (not batch.repeated),
            ids.value_lengths().to_numpy(),
            batch.per_row,
        )


class PadCollator:
    """Makes a right-padded batch of documents.

    Args:
        pad_token_id: Fills `input_ids` after a row's end.
        pad_to_multiple_of: Rows are padded to a multiple of this length, which suits tensor cores.
        max_length: Limit of the padded length.
        packed: Several documents a row: return `position_ids` that restart with every document, padding included.
            transformers derives the attention within documents from them, if there is neither an attention mask nor a
            cache.

    Returns:
        `input_ids` (B, T) int64; `labels` (B, T) int64, aligned with them, -100 where not trained; packed,
        `position_ids` (B, T) int64; otherwise, if there is any padding, `attention_mask` (B, T) int64.
    """

    def __init__(
        self, pad_token_id: int, pad_to_multiple_of: int = 8, max_length: int | None = None, packed: bool = False
    ) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length
        self.packed = packed

    def __call__(self, documents: Documents) -> dict[str, Tensor]:
        """Return the batch."""
        lengths, per_row = documents.lengths.astype(np.int64), documents.per_row
        row_ends = np.cumsum(lengths)[np.cumsum(per_row) - 1]
        row_lengths = np.diff(row_ends, prepend=0)
        columns = np.arange(padded_width(int(row_lengths.max()), self.pad_to_multiple_of, self.max_length))
        filled = columns < row_lengths[:, None]
        input_ids = np.full(filled.shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(filled.shape, IGNORE_INDEX, dtype=np.int64)
        input_ids[filled] = documents.input_ids
        labels[filled] = np.where(documents.trained, documents.input_ids, IGNORE_INDEX)
        batch = {"input_ids": input_ids, "labels": labels}
        if self.packed:
            positions = columns - row_lengths[:, None]
            positions[filled] = np.arange(len(documents.input_ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            batch["position_ids"] = positions
        elif not filled.all():
            batch["attention_mask"] = filled.astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}
