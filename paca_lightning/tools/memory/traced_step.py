"""One training step on tensors without data, in the order in which Lightning takes it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paca_lightning.activation_checkpointing import blocks as checkpointing
from paca_lightning.conversion.write_back import attach
from paca_lightning.core.private.torch import shards_copied_before_gathering
from paca_lightning.core.private.transformers import packing_not_detected
from paca_lightning.layers.base import paca_layers
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.tools.memory.tracing import Kind, MemoryTracer, Timeline


@dataclass(frozen=True, kw_only=True)
class TracedRun:
    """What determines the memory of a training step on one device.

    Args:
        module: As a LightningCLI builds it: its model is made in ``configure_model``. It is left as it is.
        convert: Freezes the module's model and changes its layers as the way of fine-tuning does; on ``meta``.
        strategy: Shards it. None: every device holds the whole model.
        ranks: Devices that train together.
        shard_size: Of these, those that share one copy of a sharded model.
        gradient_buckets: Whether gradients are exchanged through a copy of them, as DDP does.
        precision: Lightning's name of it.
        batch_size: Sequences of a micro-batch, on each rank.
        tokens: Length of each.
        packed: Whether sequences hold several documents, with positions of their own.
        accumulate: Micro-batches of an optimizer step.
        accelerator: Trace what an accelerator runs. False: what a CPU runs.
    """

    module: LightningModule
    convert: Callable[[LightningModule], None]
    strategy: FSDP2Strategy | None = None
    ranks: int = 1
    shard_size: int | None = None
    gradient_buckets: bool = False
    precision: str = "32-true"
    batch_size: int = 1
    tokens: int = 512
    packed: bool = False
    accumulate: int = 1
    accelerator: bool = True

    @property
    def block_names(self) -> list[str] | None:
        """Class names of the model's blocks; None: those that Hugging Face models declare."""
        return None if self.strategy is None else self.strategy.blocks


def trace_step(
    run: TracedRun, module: LightningModule, precision: Precision, optimizers: list[Optimizer], blocks: list[nn.Module]
) -> Timeline:
    """Memory during one step, after the steps before it have filled the optimizer's state.

    Args:
        run: The run.
        module: Its tensors have no data; sharded if the run shards it.
        precision: What its steps run in.
        optimizers: Of the module.
        blocks: The module's.
    """
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if run.accelerator and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True  # PyTorch's choice for tensors on an accelerator
        if any(layer.paca_delta.requires_grad for _, layer in paca_layers(module)):
            attach(optimizer, module)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    tracer = MemoryTracer()
    offloaded = run.strategy is not None and run.strategy.options.cpu_offload
    tensors = [*module.parameters(), *module.buffers()]
    states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
    with tracer.elsewhere() if offloaded else nullcontext():
        tracer.hold((tensor for tensor in tensors if isinstance(tensor, DTensor)), Kind.PARAMETERS)
        tracer.hold((p.grad for p in trained if p.grad is not None), Kind.GRADIENTS)
        tracer.hold((value for value in states if isinstance(value, Tensor)), Kind.OPTIMIZER)
    tracer.hold((tensor for tensor in tensors if not isinstance(tensor, DTensor)), Kind.PARAMETERS)
    if run.gradient_buckets:
        buckets = [torch.empty_like(p) for p in trained]
        tracer.hold(buckets, Kind.GRADIENTS)
    batch = _batch(run)
    tracer.hold(batch.values(), Kind.ACTIVATIONS)
    micro_batches = min(run.accumulate, 2)  # the second begins with the gradients of the first, as all later ones do
    with ExitStack() as hooks, nullcontext() if run.packed else packing_not_detected(), _host_memory(tracer), tracer:
        if offloaded:
            hooks.enter_context(shards_copied_before_gathering())
        for number, block in enumerate(blocks):
            for handle in _mark(tracer, number, block, last=number == len(blocks) - 1):
                hooks.callback(handle.remove)
        for micro_batch in range(micro_batches):
            last = micro_batch == micro_batches - 1
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last)
            tracer.enter("forward")
            with precision.train_step_context():
                loss = module.training_step(batch, micro_batch)
            if loss is None or not isinstance(loss, Tensor):
                loss = loss["loss"]  # type: ignore[index]
            if run.accumulate > 1:
                loss = loss / run.accumulate
            tracer.end_forward()
            tracer.enter("backward")
            if micro_batch == 0:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            loss.backward()
            del loss
            tracer.end_backward(elsewhere=offloaded and last)  # until the last, gradients stay where they were summed
        tracer.enter("optimizer")
        with tracer.elsewhere() if offloaded else nullcontext():
            for optimizer in optimizers:
                optimizer.step()
    return tracer.timeline(sum(parameter.numel() for parameter in trained))


@contextmanager
def _host_memory(tracer: MemoryTracer) -> Iterator[None]:
    """Tell what is offloaded from what stays: all traced tensors are of one device."""

    def to_host(tensor: Tensor) -> Tensor:
        with tracer.elsewhere():
            return tensor.clone()

    originals = checkpointing.to_host, checkpointing.to_device
    checkpointing.to_host, checkpointing.to_device = to_host, lambda tensor, device: tensor.clone()
    try:
        yield
    finally:
        checkpointing.to_host, checkpointing.to_device = originals


def _mark(tracer: MemoryTracer, number: int, block: nn.Module, *, last: bool) -> Iterator[Any]:
    """Hooks that tell the tracer where a block's forward and its backward begin, and the last block's forward ends."""

    def before(*_: Any) -> None:
        if tracer.phase.startswith("forward"):
            tracer.enter(f"forward {number}")

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not tracer.phase.startswith("forward"):
            return
        if last:
            tracer.enter("forward head")
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: tracer.enter(f"backward {number}"))

    yield block.register_forward_pre_hook(before)
    yield block.register_forward_hook(after)


def _batch(run: TracedRun) -> dict[str, Tensor]:
    shape = (run.batch_size, run.tokens)
    ids = torch.zeros(shape, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if run.packed:
        batch["position_ids"] = ids.clone()
    return batch
