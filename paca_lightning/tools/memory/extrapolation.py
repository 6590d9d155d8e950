"""Memory of a model with many equal blocks, extrapolated from traces of the same model with few."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from paca_lightning.tools.memory.timeline import Timeline

FEW = 4
"""Blocks of the shorter trace: two at each end, where prefetching makes them differ from those in the middle."""

_Segment = tuple[str, np.ndarray]


def extrapolate(short: Timeline, long: Timeline, blocks: int) -> Timeline | None:
    """The exact peak with many blocks.

    One more equal block adds the same operators to the forward and to the backward. After every other operator, memory
    is larger by a constant: the block's parameters, gradients, and what it saves for the backward. So the memory after
    each operator is linear in the number of blocks. Within the middle blocks it is linear in a block's position, and
    therefore largest in the second block or the last but one, which both traces have.

    Args:
        short: A step with :data:`FEW` blocks.
        long: A step with one block more.
        blocks: How many the whole model has.

    Returns:
        Memory around the first and the last blocks of the whole model. None if the two traces do not correspond.
    """
    best: Timeline | None = None
    more_blocks = blocks - FEW - 1
    trained = long.trainable_parameters + more_blocks * (long.trainable_parameters - short.trainable_parameters)
    for middle in range(1, FEW):
        before, after = list(_segments(short)), list(_without(middle, _segments(long)))
        if not _correspond(before, after):
            continue  # a block that prefetches another has operators that the others lack
        phases: list[str] = []
        parts: list[np.ndarray] = []
        for (name, few), (_, more) in zip(before, after, strict=True):
            if len(few) != len(more):  # the optimizer's, which loops over all blocks
                few, more = (rows[rows.sum(1).argmax()][None] for rows in (few, more))
            parts.append(more + more_blocks * (more - few))
            phases += [_renamed(name, middle, more_blocks + 1)] * len(more)
        timeline = Timeline(phases, np.concatenate(parts), trained)
        if best is None or timeline.peak > best.peak:
            best = timeline
    return best


def _correspond(before: list[_Segment], after: list[_Segment]) -> bool:
    """Whether two traces have the same segments, and those of blocks the same number of operators."""
    return [name for name, _ in before] == [name for name, _ in after] and all(
        len(few) == len(more) or not name[-1].isdigit() for (name, few), (_, more) in zip(before, after, strict=True)
    )


def _segments(timeline: Timeline) -> Iterator[_Segment]:
    """Phases in order, each with its rows of sizes."""
    start = 0
    for name, operators in groupby(timeline.phases):
        stop = start + len(list(operators))
        yield name, timeline.sizes[start:stop]
        start = stop


def _without(block: int, segments: Iterator[_Segment]) -> Iterator[_Segment]:
    """Leave one block out, and renumber the blocks after it."""
    for name, rows in segments:
        if name.split()[-1] != str(block):
            yield _renamed(name, block + 1, -1), rows


def _renamed(name: str, first: int, shift: int) -> str:
    """A phase's name with its block's number shifted, from the block ``first`` on."""
    phase, _, number = name.partition(" ")
    return f"{phase} {int(number) + shift}" if number.isdecimal() and int(number) >= first else name
