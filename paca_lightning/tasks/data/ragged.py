"""Rows of different lengths in one flat array, and how they are padded."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class Ragged:
    """Rows of numbers, of any lengths.

    Args:
        rows: The rows.
        dtype: Of the numbers.
    """

    def __init__(self, rows: Iterable[Sequence[int]], dtype: type[np.integer] = np.int32) -> None:
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        self.lengths = np.array([len(row) for row in arrays], dtype=np.int64)
        self._values = np.concatenate([np.empty(0, dtype), *arrays])
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        end = self._ends[number]
        return self._values[end - self.lengths[number] : end]


def padded_width(longest: int, multiple: int, limit: int | None) -> int:
    """What rows are padded to: a multiple of a number, up to a limit, which rows of their own may exceed."""
    width = -(-longest // multiple) * multiple
    return width if limit is None else max(longest, min(width, limit))


def padded(rows: Sequence[np.ndarray], fill: int, width: int) -> Tensor:
    """Rows as one int64 tensor (rows, width), filled up on the right."""
    result = np.full((len(rows), width), fill, dtype=np.int64)
    for number, row in enumerate(rows):
        result[number, : len(row)] = row
    return torch.from_numpy(result)


def padding_mask(rows: Sequence[np.ndarray], width: int) -> Tensor | None:
    """1 where a row has a value, 0 where it is filled up, int64 (rows, width); None without any padding."""
    lengths = np.array([len(row) for row in rows])
    return None if lengths.min() == width else torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64))
