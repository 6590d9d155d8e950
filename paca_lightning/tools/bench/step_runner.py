"""A model trained by one method, whose steps are timed phase by phase."""

import contextlib
import time
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from paca_lightning.activation_checkpointing.blocks import find_blocks
from paca_lightning.conversion.write_back import attach
from paca_lightning.layers.base import paca_layers
from paca_lightning.tools.bench.workload import Workload


class Measured(Protocol):
    """What the measurement of a step needs to know of a method."""

    @property
    def title(self) -> str:
        """Its name, unique among those that are measured together."""
        ...

    @property
    def label(self) -> str:
        """Its name for people."""
        ...

    @property
    def floor(self) -> str:
        """Title of the method whose step it is compared with."""
        ...

    def apply(self, base: nn.Module) -> nn.Module:
        """A model for this method, made from a base model that is left as it is."""
        ...

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of what such a model trains."""
        ...


class StepTime(NamedTuple):
    """Seconds of one optimizer step."""

    forward: float
    backward: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of all three phases."""
        return sum(self)


class StepRunner:
    """Takes training steps with one method and its optimizer.

    Args:
        method: How the model is trained.
        base: The model as built. It is left as it is.
        workload: What a step is.

    Attributes:
        method: How the model is trained.
        trainable_parameters: How many parameters the method trains.
        resident: All parameters and buffers; they are in memory whatever the backward needs.
        compiled: Whether the blocks are compiled.
    """

    def __init__(self, method: Measured, base: nn.Module, workload: Workload) -> None:
        self.method = method
        model = method.apply(base)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trainable_parameters = sum(parameter.numel() for parameter in trained)
        self.resident: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.compiled = workload.compile
        self._optimizer = method.optimizer(model) if trained else None
        if self._optimizer is not None and any(True for _ in paca_layers(model)):
            attach(self._optimizer, model)
        if workload.compile:
            # Block by block, as a run does it: equal blocks share one compilation.
            for block in find_blocks(model):
                block.compile()
        if workload.ranks > 1 and trained:  # DDP refuses the floor, which has no gradient to exchange
            model = DistributedDataParallel(model, broadcast_buffers=False)
        self._ranks, self._accelerated = workload.ranks, workload.device != "cpu"
        self._model: Any = model
        self.forward: Any = model

    def step(self, micro_batches: list[dict[str, Tensor]]) -> StepTime:
        """Take one optimizer step over micro-batches, each of shape (batch, tokens), and time it."""
        if self._ranks > 1:
            dist.barrier()
        forward = backward = 0.0
        start = self._now()
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            distributed = isinstance(self._model, DistributedDataParallel)
            with contextlib.nullcontext() if last or not distributed else self._model.no_sync():
                loss = self.forward(**batch).loss / len(micro_batches)
                middle = self._now()
                loss.backward()
            end = self._now()
            forward, backward, start = forward + middle - start, backward + end - middle, end
        if self._optimizer is not None:
            self._optimizer.step()  # and, for PaCA, the write-back
            self._optimizer.zero_grad()
        return StepTime(forward, backward, self._now() - start)

    def _now(self) -> float:
        """Seconds, once all that was launched on the device has ended."""
        if self._accelerated:
            torch.accelerator.synchronize()
        return time.perf_counter()
