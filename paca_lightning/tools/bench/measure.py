"""Step times of several methods, taken in turns in one process, and the bytes that each saves for the backward."""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, UntypedStorage

from paca_lightning.tools.bench.step_runner import Measured, StepRunner, StepTime
from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.memory.timeline import Kind
from paca_lightning.tools.memory.tracing import MemoryTracer

M = TypeVar("M", bound=Measured)

WARM_UP = 2
NOISY_SPREAD = 0.05
"""Interquartile range of a ratio, relative to it, above which a few percent between two methods mean little."""


@dataclass(frozen=True)
class Timing:
    """What one method's steps cost. Times are medians in milliseconds.

    Attributes:
        step_ms: A whole optimizer step.
        forward_ms: Its forwards.
        backward_ms: Its backwards.
        optimizer_ms: The optimizer, zero_grad and, for PaCA, the write-back.
        ratio_to_floor: Median of the ratios of a step to the floor's step of the same round.
        ratio_quartiles: First and third quartile of these ratios.
        tokens_per_second: Of all ranks together.
        saved_bytes: Saved for the backward at the end of a micro-batch's forward.
        trainable_parameters: How many parameters the method trains.
    """

    step_ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    ratio_to_floor: float
    ratio_quartiles: tuple[float, float]
    tokens_per_second: float
    saved_bytes: int
    trainable_parameters: int

    @property
    def noisy(self) -> bool:
        """Whether the interquartile range of the ratio is more than 5% of it."""
        low, high = self.ratio_quartiles
        return high - low > NOISY_SPREAD * self.ratio_to_floor


def time_methods(
    workload: Workload, methods: Sequence[M], steps: int, progress: Callable[[str], None] = lambda text: None
) -> dict[M, Timing]:
    """Time methods in turns, step by step, so that whatever slows the machine down slows all of them down.

    Args:
        workload: What a step is. With several ranks, call this on each of them.
        methods: The methods, with their floors.
        steps: Timed steps of each method, after the warm-up.
        progress: Called with what is being done.

    Returns:
        The figures of each method.
    """
    progress("building the models")
    base = workload.build()
    if workload.compile:
        torch.compiler.config.recompile_limit = 4 * len(methods)  # every method compiles the blocks again
        torch.compiler.config.fail_on_recompile_limit_hit = True  # PyTorch would run them eagerly without a word
    runners = [StepRunner(method, base, workload) for method in methods]
    saved = []
    for runner in runners:
        progress(f"{runner.method.label}: {'compiling' if workload.compile else 'counting saved bytes'}")
        saved.append(saved_bytes(runner, workload.micro_batch(0)))
    times: list[list[StepTime]] = [[] for _ in methods]
    gc.collect()
    gc.disable()  # a collection would count against the method in whose step it falls
    try:
        for round_number in range(WARM_UP + steps):
            compiling = ", compiling backwards" if workload.compile and round_number == 0 else ""
            progress(f"step {round_number + 1} of {WARM_UP + steps}{compiling}")
            # New tokens, as in a run. With the same ones, the floor's routers would send as many tokens to each expert
            # as before, and oneDNN would compile new kernels for all methods but the floor.
            first = round_number * workload.accumulate
            micro_batches = [workload.micro_batch(first + number) for number in range(workload.accumulate)]
            # Each round starts with another method. Otherwise each would always find the caches of the same other one.
            for turn in range(len(runners)):
                number = (turn + round_number) % len(runners)
                time = runners[number].step(micro_batches)
                if round_number >= WARM_UP:
                    times[number].append(time)
    finally:
        gc.enable()
    totals = {method.title: [time.total for time in own] for method, own in zip(methods, times, strict=True)}
    return {
        method: _summary(runner, own, totals[method.floor], held, workload)
        for method, runner, own, held in zip(methods, runners, times, saved, strict=True)
    }


def _summary(runner: StepRunner, own: list[StepTime], floor: list[float], saved: int, workload: Workload) -> Timing:
    ratios = [time.total / least for time, least in zip(own, floor, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    step = statistics.median(time.total for time in own)
    return Timing(
        step_ms=1e3 * step,
        forward_ms=1e3 * statistics.median(time.forward for time in own),
        backward_ms=1e3 * statistics.median(time.backward for time in own),
        optimizer_ms=1e3 * statistics.median(time.optimizer for time in own),
        ratio_to_floor=middle,
        ratio_quartiles=(low, high),
        tokens_per_second=workload.ranks * workload.accumulate * workload.batch * workload.tokens / step,
        saved_bytes=saved,
        trainable_parameters=runner.trainable_parameters,
    )


def saved_bytes(runner: StepRunner, micro_batch: dict[str, Tensor]) -> int:
    """Bytes that a forward saves for the backward: each storage once and whole, without parameters and buffers.

    Args:
        runner: The model.
        micro_batch: Shape (batch, tokens).

    Returns:
        Bytes that the forward allocated and the loss keeps alive. With compiled blocks, whose operators are not seen,
        bytes that autograd saved.
    """
    if runner.compiled:
        return _saved_by_autograd(runner, micro_batch)
    tracer = MemoryTracer()
    tracer.hold(runner.resident, Kind.PARAMETERS)
    with tracer:
        loss = runner.forward(**micro_batch).loss
        tracer.end_forward()
    kept = tracer.in_use(Kind.ACTIVATIONS)
    del loss
    return kept


def _saved_by_autograd(runner: StepRunner, micro_batch: dict[str, Tensor]) -> int:
    resident = {tensor.untyped_storage().data_ptr() for tensor in runner.resident}
    storages: dict[int, UntypedStorage] = {}  # kept alive, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = runner.forward(**micro_batch).loss
    del loss
    return sum(storage.nbytes() for storage in storages.values())
