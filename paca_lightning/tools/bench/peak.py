"""Peak memory of a method, measured in a process of its own, and the longest sequence that fits a budget."""

import ctypes
import gc
import math
import re
import resource
from dataclasses import replace
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessExitedException

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.bench.methods import Method
from paca_lightning.tools.bench.processes import in_fresh_processes
from paca_lightning.tools.bench.step_runner import StepRunner
from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.units import format_bytes, parse_bytes

STEPS = 2
"""Steps to measure: the optimizer has its state from the second step on."""

GRANULARITY = 64
"""Tokens between two lengths of a sequence that are tried."""


def peak_bytes(workload: Workload, method: Method, budget: float = math.inf) -> float:
    """Peak memory of training on one device, measured in a fresh process.

    On an accelerator, this is the allocator's peak. On the CPU, it is the peak of the process' resident memory, less
    what was resident before the model was built. Freed memory is returned to the system at once there, so that the peak
    is that of memory in use.

    Args:
        workload: What a step is.
        method: How the model is trained.
        budget: Bytes that the process may use. Allocations fail well above it, so that the machine is not exhausted.

    Returns:
        Bytes on rank 0, or infinity if the machine's memory or the budget was not enough.
    """
    try:
        return in_fresh_processes(_measure, workload, method, budget, ranks=workload.ranks, device=workload.device)
    except ProcessExitedException as error:
        if error.signal_name in ("SIGKILL", "SIGABRT", "SIGSEGV"):  # how a process without memory ends
            return math.inf
        raise


def longest_sequence(workload: Workload, method: Method, budget: str) -> int:
    """Longest sequence, in multiples of 64 tokens, with which training stays within a budget.

    Args:
        workload: What a step is; its own length is ignored.
        method: How the model is trained.
        budget: Memory of one device, such as ``24GiB``.

    Returns:
        Tokens of each of the ``batch`` sequences; 0 if not even 64 fit.
    """
    limit = parse_bytes(budget)

    def fits(units: int) -> bool:
        tokens = units * GRANULARITY
        if tokens > workload.longest:
            return False
        return peak_bytes(replace(workload, tokens=tokens), method, limit) <= limit

    below, above = 0, 1
    while fits(above):
        below, above = above, 2 * above
    while above - below > max(1, below // 32):
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below * GRANULARITY


def check_budget(workload: Workload, budget: str) -> None:
    """Check that a budget is larger than the weights, and that memory can be measured.

    Raises:
        PaCAError: If not.
    """
    if not is_measurable(workload):
        raise PaCAError("--max-length needs measured memory: on the CPU only under Linux and without --compile.")
    parameters = workload.skeleton().parameters()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if parse_bytes(budget) <= weights:
        raise PaCAError(f"A budget of {budget} is below the model itself: its weights take {format_bytes(weights)}.")


def is_measurable(workload: Workload) -> bool:
    """Whether peaks can be measured: on accelerators, and on the CPU under Linux if no compiler takes memory, too."""
    return workload.device != "cpu" or (not workload.compile and Path("/proc/self/clear_refs").exists())


def _measure(workload: Workload, method: Method, budget: float) -> float:
    if workload.device != "cpu":
        return _device_peak(workload, method)
    # Memory that libraries allocate once, on first use, is not the model's: a tiny run allocates it before.
    train_from_reset_peak(
        Workload(preset="small", layers=1, tokens=8, dtype=workload.dtype, threads=workload.threads), method
    )
    _return_freed_memory()
    baseline = _status("VmRSS")
    _limit_memory(budget)
    try:
        train_from_reset_peak(workload, method)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error) or "could not create" in str(error):
            return math.inf
        raise
    return float(_status("VmHWM") - baseline)


def _device_peak(workload: Workload, method: Method) -> float:
    try:
        train_from_reset_peak(workload, method)
    except torch.OutOfMemoryError:
        return math.inf
    return float(torch.accelerator.max_memory_allocated())


def train_from_reset_peak(workload: Workload, method: Method) -> None:
    """Build a model, reset this process' peak, and train a few steps: the peak is then that of training."""
    runner = StepRunner(method, workload.build(), workload)
    gc.collect()  # the base's copied weights must be gone before the first step, not whenever a collection comes
    if workload.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.accelerator.reset_peak_memory_stats()
    for _ in range(STEPS):
        runner.step([workload.micro_batch(number) for number in range(workload.accumulate)])


def _return_freed_memory() -> None:
    """Make glibc return freed memory to the system, now and from here on. Other C libraries are left as they are."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        map_threshold = -3  # M_MMAP_THRESHOLD: larger blocks are mappings of their own, unmapped when freed
        library.mallopt(map_threshold, 64 * 1024)
        library.malloc_trim(0)


def _limit_memory(budget: float) -> None:
    """Make allocations fail well above a budget, so that a sequence far too long does not exhaust the machine."""
    if math.isfinite(budget):
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 2 * int(budget), resource.RLIM_INFINITY))


def _status(field: str) -> int:
    """Bytes in a field of /proc/self/status, such as VmRSS (resident memory) or VmHWM (its peak)."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return 1024 * int(match[1])
