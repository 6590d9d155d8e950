"""Best-fit-decreasing packing of documents into rows of one length."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise

import numpy as np


class Packing:
    """Packs documents into rows of `capacity` tokens by best-fit decreasing.

    Which lengths share a pack depends on the lengths alone and is planned once; `draw` chooses among documents of equal
    length. So every epoch has the same number of packs.

    Args:
        lengths: Tokens of each document, shape (documents,); none may exceed the capacity.
        capacity: Most tokens of a pack.
    """

    def __init__(self, lengths: np.ndarray, capacity: int) -> None:
        self.lengths = lengths
        self._packs = best_fit_decreasing(np.sort(lengths)[::-1], capacity)
        self._by_pack = np.argsort(self._packs, kind="stable")
        self.sizes = np.bincount(self._packs)
        """Documents in each pack, shape (packs,)."""

    def __len__(self) -> int:
        return len(self.sizes)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The documents in the order of the packs, shape (documents,): the first `sizes[0]` are in pack 0.

        Args:
            rng: Chooses among documents of equal length.
        """
        ties = rng.permutation(len(self.lengths))
        return np.lexsort((ties, -self.lengths))[self._by_pack]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign each document to the fullest pack that still has room for it.

    Documents of equal length, and packs with equal room, are handled as groups. So the number of steps grows with the
    distinct lengths, not with the documents: a million documents take well under a second.

    Args:
        lengths: Lengths in descending order, shape (documents,).
        capacity: Room of an empty pack.

    Returns:
        Each document's pack, shape (documents,), int64; packs are numbered from 0 without gaps.
    """
    packs = np.empty(len(lengths), dtype=np.int64)
    room: dict[int, list[np.ndarray]] = {}  # packs by the room left in them
    rooms: list[int] = []  # its keys, ascending
    opened = 0

    def put(left: int, group: np.ndarray) -> None:
        if left and len(group):
            if left not in room:
                insort(rooms, left)
            room.setdefault(left, []).append(group)

    for length, first, last in _runs(lengths):
        while first < last:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                left = rooms.pop(at)
                open_packs = np.concatenate(room.pop(left))
            else:
                left = capacity
                open_packs = np.arange(opened, opened - (first - last) // (capacity // length) + 1)
                opened += len(open_packs)
            each = left // length  # the best-fitting pack stays the best until it has no room for another
            used = min(len(open_packs), -((first - last) // each))
            filled = min(each * used, last - first)
            packs[first : first + filled] = np.repeat(open_packs[:used], each)[:filled]
            first += filled
            short = each * used - filled  # the last pack may get fewer
            put(left - each * length, open_packs[: used - bool(short)])
            put(left - (each - short) * length, open_packs[used - bool(short) : used])
            put(left, open_packs[used:])
    return packs


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (value, start, end) for each run of equal values."""
    bounds = np.flatnonzero(np.diff(values, prepend=values[:1] + 1, append=values[-1:] - 1))
    for start, end in pairwise(bounds):
        yield int(values[start]), int(start), int(end)
