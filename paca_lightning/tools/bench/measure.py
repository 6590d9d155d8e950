"""Step times of several methods, taken in turns in one process, and the bytes each saves for its backward."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage

from paca_lightning.tools.bench.methods import Method
from paca_lightning.tools.bench.step_runner import StepRunner, StepTime
from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.memory.timeline import Kind
from paca_lightning.tools.memory.tracing import MemoryTracer

WARM_UP = 2
# Beyond this, half of the steps differ so much that a few percent between two methods mean little.
NOISY_SPREAD = 0.05


@dataclass(frozen=True)
class Timing:
    """What one method's steps took. Times are medians in milliseconds.

    Attributes:
        step_ms: Of a whole optimizer step.
        forward_ms: Of its forwards.
        backward_ms: Of its backwards.
        optimizer_ms: Of the optimizer with zero_grad and, for PaCA, the write-back.
        ratio_to_floor: Median of each step's ratio to the step beside it of the method's floor.
        ratio_quartiles: First and third quartile of that ratio.
        tokens_per_second: On all ranks together.
        saved_bytes: Held for the backward at the end of a micro-batch's forward.
        trainable_parameters: How many numbers the method trains.
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
        """Whether the ratio's interquartile range is more than 5% of it."""
        low, high = self.ratio_quartiles
        return high - low > NOISY_SPREAD * self.ratio_to_floor


def time_methods(
    workload: Workload, methods: list[Method], steps: int, progress: Callable[[str], None] = lambda text: None
) -> dict[Method, Timing]:
    """Measure methods step by step in turns, so that whatever slows the machine slows all of them.

    Args:
        workload: The step to take. With several ranks, call this on each of them.
        methods: The methods, their floors among them.
        steps: Timed steps of each method, after the warm-up.
        progress: Told what is being done.

    Returns:
        Figures by method.
    """
    progress("building the models")
    base = workload.build()
    if workload.compile:
        torch.compiler.config.recompile_limit = 4 * len(methods)  # every method compiles the same blocks anew
        torch.compiler.config.fail_on_recompile_limit_hit = True  # rather than to run them eagerly without a word
    runners = [StepRunner(method, base, workload) for method in methods]
    micro_batches = [workload.micro_batch(number) for number in range(workload.accumulate)]
    saved = []
    for runner in runners:
        progress(f"{runner.method.label}: {'compiling' if workload.compile else 'what it saves for the backward'}")
        saved.append(saved_bytes(runner, micro_batches[0]))
    times: list[list[StepTime]] = [[] for _ in methods]
    gc.collect()
    gc.disable()  # a collection in the middle of one method's step would be counted against it
    try:
        for round_number in range(WARM_UP + steps):
            compiling = ", compiling backwards" if workload.compile and round_number == 0 else ""
            progress(f"step {round_number + 1} of {WARM_UP + steps}{compiling}")
            # Each round starts with another method, so that none always finds the caches as the same other left them.
            for turn in range(len(runners)):
                number = (turn + round_number) % len(runners)
                time = runners[number].step(micro_batches)
                if round_number >= WARM_UP:
                    times[number].append(time)
    finally:
        gc.enable()
    totals = {method.title: [time.total for time in own] for method, own in zip(methods, times, strict=True)}
    return {
        runner.method: _summary(runner, own, totals[runner.method.floor], held, workload)
        for runner, own, held in zip(runners, times, saved, strict=True)
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
    """Bytes that a forward leaves for the backward: each storage once and whole, parameters and buffers left out.

    Args:
        runner: The model.
        micro_batch: Shape (batch, tokens).

    Returns:
        What the forward allocated and the loss keeps alive. In compiled blocks, where single operators are not seen:
        what autograd saved.
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
    storages: dict[int, UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = runner.forward(**micro_batch).loss
    del loss
    return sum(storage.nbytes() for storage in storages.values())
