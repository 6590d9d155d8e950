"""One training step on tensors without data, in the order in which Lightning takes it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
from paca_lightning.core.private.torch import shards_copied_before_gathering, tensors_in
from paca_lightning.core.private.transformers import packing_not_detected
from paca_lightning.layers.base import paca_layers
from paca_lightning.tasks.classifier import ClassifierModule
from paca_lightning.tasks.embedding import EmbeddingModule
from paca_lightning.tasks.preference import PreferenceModule
from paca_lightning.tools.memory.timeline import Kind, Timeline
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.memory.tracing import MemoryTracer


def trace_step(
    run: TracedRun, module: LightningModule, precision: Precision, optimizers: list[Optimizer], blocks: list[nn.Module]
) -> Timeline:
    """Memory during one step that follows others: the optimizer has its state, and old gradients are still there.

    Args:
        run: The run.
        module: Its tensors have no data. Sharded if the run shards it.
        precision: Lightning's plugin for the run's precision.
        optimizers: The module's.
        blocks: The module's; the timeline names the operators of each.
    """
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    _take_step_before(run, module, optimizers, trained)
    tracer, batch = MemoryTracer(), _batch(run)
    _hold_state(tracer, run, module, optimizers, trained)
    tracer.hold(tensors_in(batch), Kind.ACTIVATIONS)
    buckets = [torch.empty_like(parameter) for parameter in trained] if run.gradient_buckets else []
    tracer.hold(buckets, Kind.GRADIENTS)
    micro_batches = min(run.accumulate, 2)  # the second begins with the gradients of the first, as all later ones do
    with _as_on_devices(run, tracer), _blocks_as_phases(tracer, blocks), tracer:
        for number in range(micro_batches):
            last = number == micro_batches - 1
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last)
            tracer.enter("forward")
            with precision.train_step_context():
                loss: Any = module.training_step(batch, number)
            if not isinstance(loss, Tensor):
                loss = loss["loss"]
            if run.accumulate > 1:
                loss = loss / run.accumulate
            tracer.end_forward()
            tracer.enter("backward")
            if number == 0:
                for optimizer in optimizers:
                    optimizer.zero_grad()
            loss.backward()
            del loss
            # With offloaded parameters, gradients are summed on the device, and leave it after the last micro-batch.
            tracer.end_backward(elsewhere=run.offloads and last)
        tracer.enter("optimizer")
        with _on_host(tracer, run):
            for optimizer in optimizers:
                optimizer.step()
    return tracer.timeline(sum(parameter.numel() for parameter in trained))


def _take_step_before(
    run: TracedRun, module: LightningModule, optimizers: list[Optimizer], trained: list[nn.Parameter]
) -> None:
    """Attach the write-back, and fill gradients and optimizer states as an earlier step would."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if run.accelerator and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True  # PyTorch's default for tensors on an accelerator
        if any(layer.paca_delta.requires_grad for _, layer in paca_layers(module)):
            attach(optimizer, module)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()


def _hold_state(
    tracer: MemoryTracer,
    run: TracedRun,
    module: LightningModule,
    optimizers: list[Optimizer],
    trained: list[nn.Parameter],
) -> None:
    """Tell the tracer what is in memory before the step; what is sharded may be in the host's."""
    tensors = [*module.parameters(), *module.buffers()]
    states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
    with _on_host(tracer, run):
        tracer.hold((tensor for tensor in tensors if isinstance(tensor, DTensor)), Kind.PARAMETERS)
        tracer.hold((p.grad for p in trained if p.grad is not None), Kind.GRADIENTS)
        tracer.hold((value for value in states if isinstance(value, Tensor)), Kind.OPTIMIZER)
    tracer.hold((tensor for tensor in tensors if not isinstance(tensor, DTensor)), Kind.PARAMETERS)


def _on_host(tracer: MemoryTracer, run: TracedRun) -> Any:
    """A context in which nothing counts for the device, if the run offloads its parameters to the host."""
    return tracer.elsewhere() if run.offloads else nullcontext()


@contextmanager
def _as_on_devices(run: TracedRun, tracer: MemoryTracer) -> Iterator[None]:
    """Inside, code that asks where tensors are or what they hold does what it does on the run's devices."""

    def to_host(tensor: Tensor) -> Tensor:
        with tracer.elsewhere():
            return tensor.clone()

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.clone()

    originals = checkpointing.to_host, checkpointing.to_device
    with ExitStack() as contexts:
        if not run.packed:
            contexts.enter_context(packing_not_detected())
        if run.offloads:
            contexts.enter_context(shards_copied_before_gathering())
        checkpointing.to_host, checkpointing.to_device = to_host, to_device
        try:
            yield
        finally:
            checkpointing.to_host, checkpointing.to_device = originals


@contextmanager
def _blocks_as_phases(tracer: MemoryTracer, blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, the tracer enters a phase where a block's forward or backward begins, and where the last forward ends."""
    handles = []

    def add_hooks(number: int, block: nn.Module) -> None:
        def before(*_: Any) -> None:
            if tracer.phase.startswith("forward"):
                tracer.enter(f"forward {number}")

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not tracer.phase.startswith("forward"):
                return
            if number == len(blocks) - 1:
                tracer.enter("forward head")
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: tracer.enter(f"backward {number}"))

        handles.extend([block.register_forward_pre_hook(before), block.register_forward_hook(after)])

    for number, block in enumerate(blocks):
        add_hooks(number, block)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batch(run: TracedRun) -> dict[str, Any]:
    """A batch of the run's shape, (batch, tokens); of preferences, twice as many; of embeddings, one for each text."""
    if isinstance(run.module, EmbeddingModule):
        texts = ("anchor", "positive", "negative")[: run.texts]
        return {text: {"input_ids": torch.zeros((run.batch_size, run.tokens), dtype=torch.int64)} for text in texts}
    preferences = isinstance(run.module, PreferenceModule)
    ids = torch.zeros((run.batch_size * (1 + preferences), run.tokens), dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if isinstance(run.module, ClassifierModule) and run.module.hparams["task"] != "tokens":
        shapes = {"multi_label": (run.batch_size, len(run.module.hparams["labels"] or ()))}
        kind = torch.int64 if run.module.hparams["task"] == "sequence" else torch.float32
        batch["labels"] = torch.zeros(shapes.get(run.module.hparams["task"], (run.batch_size,)), dtype=kind)
    if isinstance(run.module, PreferenceModule):
        batch["rows"] = torch.zeros(run.batch_size, dtype=torch.int64)
        if run.module.preference.name == "kto":
            batch["good"] = torch.zeros(run.batch_size, dtype=torch.bool)
    if run.packed:
        batch["position_ids"] = ids.clone()
    return batch
