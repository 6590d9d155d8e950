"""Batches of preferences: the good answers' rows first, the bad ones' behind them."""

from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from paca_lightning.tasks.data.collate import Documents, PadCollator
from paca_lightning.tasks.data.sampler import Batch


class Preferences(NamedTuple):
    """Twice as many conversations as rows, the numbers of the rows (B,), and with labels whether each is good (B,)."""

    documents: Documents
    rows: np.ndarray
    good: np.ndarray | None


class PreferenceReader(torch.utils.data.Dataset[Preferences]):
    """Reads a batch of preferences from memory-mapped Arrow.

    Pairs give their chosen and their rejected conversations. Rows with a label give themselves, and behind them their
    prompts with strange answers: that of the next row of the data, which is the same in every batch and epoch.

    Args:
        dataset: As `PreferenceEncoder` makes it; all of it pairs, or all rows with a label.
        max_length: Most tokens of a conversation.
        paired: Which of the two it is.
    """

    def __init__(self, dataset: Dataset, max_length: int, paired: bool) -> None:
        names = ["input_ids", "trained", "chosen_length"]
        self._table = dataset.select_columns(names).with_format("arrow")
        self._max_length = max_length
        self._paired = paired

    def __getitems__(self, batch: Batch) -> Preferences:  # torch's fetcher passes the whole batch
        rows, used = batch.documents, not batch.repeated
        ids, trained, firsts = self._read(rows)
        if self._paired:
            sides = [[slice(first) for first in firsts], [slice(first, None) for first in firsts]]
            pieces = [(i[side], t[side]) for part in sides for i, t, side in zip(ids, trained, part, strict=True)]
            return Preferences(_documents(pieces, used), rows, None)
        other_ids, other_trained, _ = self._read((rows + 1) % len(self._table))
        strange = []
        for own, own_trained, other, its_trained in zip(ids, trained, other_ids, other_trained, strict=True):
            start, begin = int(own_trained.argmax()), int(its_trained.argmax())
            both = np.concatenate([own[:start], other[begin:]])[: self._max_length]
            marks = np.concatenate([np.zeros(start, bool), its_trained[begin:]])[: self._max_length]
            strange.append((both, marks))
        documents = _documents([*zip(ids, trained, strict=True), *strange], used)
        return Preferences(documents, rows, np.asarray(firsts) > 0)

    def _read(self, rows: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
        table = self._table[rows]
        ids, trained = (table.column(name).combine_chunks() for name in ("input_ids", "trained"))
        ends = np.cumsum(pc.list_value_length(ids).to_numpy())[:-1]
        flat = trained.flatten().to_numpy(zero_copy_only=False)
        return np.split(ids.flatten().to_numpy(), ends), np.split(flat, ends), table.column("chosen_length").to_pylist()


def _documents(pieces: list[tuple[np.ndarray, np.ndarray]], used: bool) -> Documents:
    lengths = np.array([len(ids) for ids, _ in pieces])
    trained = np.concatenate([marks for _, marks in pieces]) & used
    return Documents(np.concatenate([ids for ids, _ in pieces]), trained, lengths, np.ones_like(lengths))


class PreferenceCollator:
    """Makes a padded batch of preferences.

    Args:
        pad: Pads the conversations.

    Returns:
        `input_ids`, `labels` and perhaps `attention_mask` (2B, T), as `PadCollator` makes them: of the chosen
        conversations, then of the rejected ones; or of rows with a label, then of their prompts with strange answers.
        `rows` (B,) int64, the numbers of the rows; with labels, `good` (B,) bool.
    """

    def __init__(self, pad: PadCollator) -> None:
        self._pad = pad

    def __call__(self, preferences: Preferences) -> dict[str, Tensor]:
        """Return the batch."""
        batch = self._pad(preferences.documents) | {"rows": torch.from_numpy(np.array(preferences.rows))}
        return batch if preferences.good is None else batch | {"good": torch.from_numpy(preferences.good)}
