"""The largest size that fits into a limit of memory, found in a few traces."""

from collections.abc import Callable


def largest_fitting(peak: Callable[[int], int], limit: int, known: tuple[int, int], resident: int) -> int:
    """Largest number of units whose peak is within a limit, to 1%.

    Peaks grow almost linearly, so the line through two known sizes is followed until one is over the limit, and between
    the two nearest sizes after that. Where a peak is far from linear, the share of the line is halved at every miss.

    Args:
        peak: Bytes at a number of units; it is slow.
        limit: Bytes.
        known: A number of units and its peak.
        resident: Bytes without any unit.

    Returns:
        0 if not even one unit fits.
    """
    if resident >= limit:
        return 0
    (units, size), below, low, above, high = known, 0, resident, 0, 0
    while not above:
        if size > limit:
            above, high = units, size
        else:
            slope = (units - below) / max(size - low, 1)
            below, low = units, size
            units = below + max(int(slope * (limit - low)), 1, below // 100)
            size = peak(units)
    misses = 0  # in a row
    while above - below > max(1, below // 100):
        share = (limit - low) / (high - low) / 2**misses
        units = below + min(max(int(share * (above - below)), 1), above - below - 1)
        size = peak(units)
        if size <= limit:
            below, low, misses = units, size, 0
            # One more step beyond the line usually closes the bracket.
            step = max(1, below // 100)
            if below + step < above and (beyond := peak(below + step)) > limit:
                above, high = below + step, beyond
        else:
            above, high, misses = units, size, misses + 1
    return below
