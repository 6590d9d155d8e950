"""One training step of a run, traced: on tensors without data, for one rank of any number of ranks."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import masking_utils

from paca_lightning.errors import PaCAError
from paca_lightning.nf4 import quantize_rows
from paca_lightning.strategies import checkpointing
from paca_lightning.strategies.fsdp2 import FSDP2Strategy
from paca_lightning.strategies.sharding import find_blocks
from paca_lightning.targets import paca_layers
from paca_lightning.tools.extrapolation import FEW, extrapolate
from paca_lightning.tools.tracing import Kind, MemoryTracer, Timeline
from paca_lightning.write_back import attach


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


class TracedModel:
    """A run's model, built and converted once on ``meta``, whose steps can be traced with any batch.

    Args:
        run: The run.

    Raises:
        PaCAError: If it cannot be traced.
    """

    def __init__(self, run: TracedRun) -> None:
        self.run = run
        quantize_rows(torch.zeros(1, 1))  # loads bitsandbytes now: its constants shall have data
        self._trainer = _quiet_trainer(run.precision)
        self._module = self._build()
        self._blocks = len(find_blocks(self._module, run.block_names))

    def step(self, *, tokens: int | None = None, batch_size: int | None = None, whole: bool = False) -> Timeline:
        """Memory during one training step, after the steps before it have filled the optimizer's state.

        In Lightning's order: forward, then the gradients of the step before are freed, backward, optimizer and
        write-back. Of many equal blocks, a few are traced.

        Args:
            tokens: Length of each sequence. Default: the run's.
            batch_size: Sequences of a micro-batch. Default: the run's.
            whole: Trace all blocks even if they are equal.
        """
        run = replace(self.run, tokens=tokens or self.run.tokens, batch_size=batch_size or self.run.batch_size)
        if not whole and self._blocks > FEW + 1 and self._equal_blocks():
            timeline = extrapolate(self._trace(run, FEW), self._trace(run, FEW + 1), self._blocks)
            if timeline is not None:
                return timeline
        return self._trace(run, None)

    def _build(self) -> LightningModule:
        precision = self._trainer.precision_plugin
        module = copy.deepcopy(self.run.module)
        with torch.device("meta"), precision.module_init_context():
            module.configure_model()
        module = module.to("meta")
        self.run.convert(module)
        return precision.convert_module(module).train()  # type: ignore[return-value]

    def _equal_blocks(self) -> bool:
        blocks = find_blocks(self._module, self.run.block_names)
        config = next((m.config for m in self._module.modules() if hasattr(m, "config")), None)
        kinds = getattr(config, "layer_types", None) or []
        shapes = {
            tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()) for block in blocks
        }
        return len(shapes) == 1 and len(set(kinds)) <= 1 and _container(self._module, blocks) is not None

    def _trace(self, run: TracedRun, layers: int | None) -> Timeline:
        module = copy.deepcopy(self._module)
        if layers is not None:
            _truncate(module, run, layers)
        with _fake_ranks(run) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
            _allocate(module)
            blocks = find_blocks(module, run.block_names)
            if run.strategy is not None:
                run.strategy._sharding_mesh = mesh
                run.strategy._shard(module)
            optimizers = _optimizers(module, self._trainer)
            return _trace_step(run, module, self._trainer.precision_plugin, optimizers, blocks)


@contextmanager
def _fake_ranks(run: TracedRun) -> Iterator[DeviceMesh | None]:
    """A process group in which this process is the first rank and the others do not exist."""
    if run.strategy is None:
        yield None
        return
    if dist.is_initialized():
        raise PaCAError("A process group exists already: estimate in a process that does not train.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=run.ranks)
    try:
        size = run.shard_size or run.ranks
        if size == run.ranks:
            yield init_device_mesh("cpu", (size,))
        else:
            yield init_device_mesh("cpu", (run.ranks // size, size), mesh_dim_names=("replicate", "shard"))
    finally:
        dist.destroy_process_group()


def _quiet_trainer(precision: str) -> Trainer:
    """A trainer that trains nothing: it knows the precision, and tells schedules the length of a run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    return Trainer(
        accelerator="cpu",
        devices=1,
        # fp16 takes as much memory, and a CPU has no autocast for it.
        precision="bf16-mixed" if precision in ("16-mixed", "16") else precision,  # type: ignore[arg-type]
        max_steps=1,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _container(module: nn.Module, blocks: list[nn.Module]) -> nn.ModuleList | None:
    """The list that holds just these blocks, if there is one."""
    lists = (child for child in module.modules() if isinstance(child, nn.ModuleList))
    return next((child for child in lists if list(child) == blocks), None)


def _truncate(module: nn.Module, run: TracedRun, layers: int) -> None:
    """Keep a model's first blocks only."""
    container = _container(module, find_blocks(module, run.block_names))
    assert container is not None
    del container[layers:]
    for child in module.modules():
        config: Any = getattr(child, "config", None)
        if hasattr(config, "num_hidden_layers"):
            child.config = copy.copy(config)
            child.config.num_hidden_layers = layers  # type: ignore[union-attr]


@torch.no_grad()
def _allocate(module: nn.Module) -> None:
    """Give every parameter and buffer a device, but no data. Parameters that are shared stay so."""
    made: dict[int, Tensor] = {}
    for child in module.modules():
        stores: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty
                store[name] = made[id(tensor)]


def _optimizers(module: LightningModule, trainer: Trainer) -> list[Optimizer]:
    module.trainer = trainer  # schedules ask it for the length of the run
    configured: Any = module.configure_optimizers()
    module.trainer = None
    if isinstance(configured, tuple):
        configured = configured[0]
    if isinstance(configured, dict):
        configured = configured["optimizer"]
    return configured if isinstance(configured, list) else [configured]


def _trace_step(
    run: TracedRun, module: LightningModule, precision: Precision, optimizers: list[Optimizer], blocks: list[nn.Module]
) -> Timeline:
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
    tracer.hold((p for p in [*module.parameters(), *module.buffers()]), Kind.PARAMETERS)
    tracer.hold((p.grad for p in trained if p.grad is not None), Kind.GRADIENTS)
    states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
    tracer.hold((value for value in states if isinstance(value, Tensor)), Kind.OPTIMIZER)
    if run.gradient_buckets:
        buckets = [torch.empty_like(p) for p in trained]
        tracer.hold(buckets, Kind.GRADIENTS)
    batch = _batch(run)
    tracer.hold(batch.values(), Kind.ACTIVATIONS)
    micro_batches = min(run.accumulate, 2)  # the second begins with the gradients of the first, as all later ones do
    with ExitStack() as hooks, _documents(packed=run.packed), _host_memory(tracer), tracer:
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
            tracer.end_backward()
        tracer.enter("optimizer")
        for optimizer in optimizers:
            optimizer.step()
    return tracer.timeline(sum(parameter.numel() for parameter in trained))


@contextmanager
def _documents(*, packed: bool) -> Iterator[None]:
    """Tell transformers whether rows hold several documents: it reads that from values, and takes it for granted here.

    Where they do, attention needs a mask of all pairs of tokens; otherwise the kernel's own causal mask.
    """
    original = masking_utils.find_packed_sequence_indices
    if not packed:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


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
