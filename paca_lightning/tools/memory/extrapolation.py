"""Memory of a model with many equal blocks, from traces of the same model with few."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from paca_lightning.tools.memory.tracing import Timeline

FEW = 4
"""Blocks of the shorter trace: two at each end, where prefetching makes them differ from those in the middle."""

_Segment = tuple[str, np.ndarray]


def extrapolate(short: Timeline, long: Timeline, blocks: int) -> Timeline | None:
    """The peak with many blocks, exactly.

    One more equal block adds the same operators to the forward and to the backward, and leaves the memory after every
    other operator larger by a constant: its parameters, what it keeps for the backward, its gradients. So memory is
    linear in the number of blocks, operator by operator, and where a block has more on both sides, linear in its
    position: at its most in the second or the last but one, which both traces have.

    Args:
        short: With :data:`FEW` blocks.
        long: With one more.
        blocks: Of the whole model.

    Returns:
        Memory around the first and the last blocks of the whole model. None if the traces do not correspond.
    """
    best: Timeline | None = None
    more_blocks = blocks - FEW - 1
    trained = long.trainable_parameters + more_blocks * (long.trainable_parameters - short.trainable_parameters)
    for middle in range(1, FEW):
        before, after = list(_segments(short)), list(_without(middle, _segments(long)))
        if not _correspond(before, after):
            continue  # blocks that prefetch another have operators that others lack
        phases: list[str] = []
        parts: list[np.ndarray] = []
        for (name, few), (_, more) in zip(before, after, strict=True):
            if len(few) != len(more):  # loops over all blocks: the optimizer's
                few, more = (rows[rows.sum(1).argmax()][None] for rows in (few, more))
            parts.append(more + more_blocks * (more - few))
            phases += [_renamed(name, middle, more_blocks + 1)] * len(more)
        timeline = Timeline(phases, np.concatenate(parts), trained)
        if best is None or timeline.peak > best.peak:
            best = timeline
    return best


def _correspond(before: list[_Segment], after: list[_Segment]) -> bool:
    """Whether two traces have the same segments, and as many operators in each block's."""
    return [name for name, _ in before] == [name for name, _ in after] and all(
        len(few) == len(more) or not name[-1].isdigit() for (name, few), (_, more) in zip(before, after, strict=True)
    )


def _segments(timeline: Timeline) -> Iterator[_Segment]:
    start = 0
    for name, operators in groupby(timeline.phases):
        stop = start + len(list(operators))
        yield name, timeline.sizes[start:stop]
        start = stop


def _without(block: int, segments: Iterator[_Segment]) -> Iterator[_Segment]:
    """Leave a block out, and number those behind it as if it did not exist."""
    for name, rows in segments:
        if name.split()[-1] != str(block):
            yield _renamed(name, block + 1, -1), rows


def _renamed(name: str, first: int, shift: int) -> str:
    phase, _, number = name.partition(" ")
    return f"{phase} {int(number) + shift}" if number.isdecimal() and int(number) >= first else name
