"""How much memory a computation allocates at its peak."""

import itertools
from collections.abc import Callable, Collection
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any], mapped: Collection[int] = ()) -> int:
    """Bytes that a function has allocated on the CPU at the most at a time.

    Args:
        function: Is called once.
        mapped: Sizes of files that it maps, which take address space and no memory.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_time = sorted(allocations, key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in in_time if abs(event.nbytes()) not in mapped))
