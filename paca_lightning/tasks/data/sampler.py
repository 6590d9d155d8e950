"""The order of batches, a pure function of seed, epoch and rank."""

from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import numpy as np
from lightning.pytorch import Trainer

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.packing import Packing

_GROUPED_STEPS = 50  # rows are sorted by length within so many steps: little padding, yet well mixed


class Share(TypedDict):
    """Which share of the documents a process takes."""

    rank: int
    world_size: int


def share_of(trainer: Trainer | None) -> Share:
    """The share of this process in a run; without a trainer, all documents."""
    ranks = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {"rank": 0, "num_replicas": 1}
    return {"rank": ranks["rank"], "world_size": ranks["num_replicas"]}


class Batch(NamedTuple):
    """The documents of a batch, row after row, and how many each row holds (one, unless packed).

    A `repeated` batch repeats a row of another rank: none of its tokens may be trained or measured.
    """

    documents: np.ndarray
    per_row: np.ndarray
    repeated: bool = False


class _Plan(NamedTuple):
    """The order of an epoch: rows, row by row, and the batches they form, step by step and rank by rank.

    `documents` holds the documents of row r at `firsts[r] : firsts[r] + sizes[r]`. Batch b is
    `rows[bounds[b] : bounds[b + 1]]`; batches from `repeats_from` on repeat a row. Position p of the epoch takes the
    batches of `steps[p]`, which train `tokens[p]` tokens on all ranks together.
    """

    documents: np.ndarray
    firsts: np.ndarray
    sizes: np.ndarray
    rows: np.ndarray
    bounds: np.ndarray
    repeats_from: int
    steps: np.ndarray
    tokens: np.ndarray | None


class BatchOrder:
    """Batches of documents for one rank, epoch by epoch.

    Every document is used exactly once an epoch. Every rank gets the same number of batches, and batch sizes differ by
    at most one row. If a step has fewer rows than ranks, some ranks get a batch that repeats a row and is marked so.

    In each step, the batches of the ranks are similar in length, so that no rank waits for another. Steps are shuffled,
    so that the first few (`limit_val_batches`) are like the rest. With `shuffle`, the step with the longest row comes
    first, so that a batch too large for the memory fails at once.

    Lightning calls `set_epoch` before each epoch (it looks for it on a loader's `sampler`).

    Args:
        lengths: Tokens of each document, shape (documents,).
        batch_size: Rows in a batch, at most.
        shuffle: Draw a new order from (seed, epoch) in each epoch. Otherwise the order is the same in every epoch:
            drawn once from the seed if rows are grouped or packed, else that of the documents.
        group_by_length: Batch rows of similar length, for less padding.
        trained: Tokens of each document that have a loss, shape (documents,); None if unknown.
        pack_to: Pack documents into rows of this many tokens; None for one document a row.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Processes that share the documents.
        name: Name of the documents in messages.

    Raises:
        PaCAError: There are fewer rows than processes.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        trained: np.ndarray | None = None,
        shuffle: bool = True,
        group_by_length: bool = True,
        pack_to: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        name: str = "data",
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.trained = None if trained is None else np.asarray(trained, dtype=np.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.pack_to = pack_to
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._planned: tuple[int, _Plan] | None = None
        self._packing = Packing(self.lengths, pack_to) if pack_to is not None else None
        self.num_rows = len(self.lengths) if self._packing is None else len(self._packing)
        if self.num_rows < world_size:
            raise PaCAError(
                f"{name}: {self.num_rows} rows cannot be shared by {world_size} processes. Use more data or fewer "
                "processes" + (", or no packing." if pack_to is not None else ".")
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iterating goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self.epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield an epoch's batches of this rank from position `start` on."""
        plan = self._plan(epoch)
        for step in plan.steps[start:]:
            batch = step * self.world_size + self.rank
            chosen = plan.rows[plan.bounds[batch] : plan.bounds[batch + 1]]
            sizes = plan.sizes[chosen]
            documents = plan.documents[_ranges(plan.firsts[chosen], sizes)]
            yield Batch(documents, sizes, repeated=batch >= plan.repeats_from)

    def trained_tokens(self, epoch: int) -> np.ndarray | None:
        """Tokens with a loss at each position of an epoch, in the batches of all ranks together, shape (batches,).

        None if `trained` is unknown.
        """
        return self._plan(epoch).tokens

    def _plan(self, epoch: int) -> _Plan:
        """The order of an epoch; that of the last epoch asked for is kept."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._draw(epoch))
        return self._planned[1]

    def _draw(self, epoch: int) -> _Plan:
        rng = np.random.default_rng([self.seed, epoch if self.shuffle else 0])
        if self._packing is None:
            documents, sizes = np.arange(self.num_rows), np.ones(self.num_rows, np.int64)
        else:
            documents, sizes = self._packing.draw(rng), self._packing.sizes
        firsts = np.cumsum(sizes) - sizes
        row_lengths = np.add.reduceat(self.lengths[documents], firsts)
        rows = self._row_order(row_lengths, rng)
        count = len(self) * self.world_size
        # Fewer than one step's batches, all in the last step: every step has a row of its own.
        repeats = max(0, count - self.num_rows)
        rows = np.append(rows, np.repeat(rows[-1:], repeats))
        bounds = np.arange(count + 1) * len(rows) // count
        steps = self._step_order(row_lengths[rows], bounds, rng)
        tokens = None
        if self.trained is not None:
            of_rows = np.add.reduceat(self.trained[documents], firsts)
            of_batches = np.add.reduceat(of_rows[rows], bounds[:-1])
            of_batches[count - repeats :] = 0
            tokens = of_batches.reshape(-1, self.world_size).sum(1)[steps]
        return _Plan(documents, firsts, sizes, rows, bounds, count - repeats, steps, tokens)

    @property
    def _mixed(self) -> bool:
        # Packing sorts by length, so its rows must be shuffled.
        return self.shuffle or self.group_by_length or self._packing is not None

    def _row_order(self, row_lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self._mixed:
            return np.arange(self.num_rows)
        order = rng.permutation(self.num_rows)
        if not self.group_by_length:
            return order
        group = _GROUPED_STEPS * self.batch_size * self.world_size
        return order[np.lexsort((-row_lengths[order], np.arange(self.num_rows) // group))]

    def _step_order(self, row_lengths: np.ndarray, bounds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self._mixed:
            return np.arange(len(self))
        steps = rng.permutation(len(self))
        if not self.shuffle:
            return steps
        longest = (np.searchsorted(bounds, np.argmax(row_lengths), side="right") - 1) // self.world_size
        return np.concatenate(([longest], steps[steps != longest]))


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Concatenate the ranges [start, start + size)."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - sizes), sizes)
