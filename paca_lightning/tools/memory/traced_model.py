"""A run's model without data, whose training steps are traced for one rank of any number of ranks."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from paca_lightning.activation_checkpointing.blocks import find_blocks
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import fake_tensors, init_fake_process_group
from paca_lightning.core.private.transformers import experts_implementation
from paca_lightning.layers.experts import ExpertWeight, PaCAExperts, expert_weights
from paca_lightning.layers.nf4 import quantize_rows
from paca_lightning.tools.memory.extrapolation import FEW, extrapolate
from paca_lightning.tools.memory.timeline import Timeline
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.memory.traced_step import trace_step
from paca_lightning.tools.quiet import quiet


class TracedModel:
    """A run's model, built and converted once on ``meta``. Its steps can be traced with any batch.

    Args:
        run: The run.

    Raises:
        PaCAError: If it cannot be traced.
    """

    def __init__(self, run: TracedRun) -> None:
        self.run = run
        quantize_rows(torch.zeros(1, 1))  # loads bitsandbytes now, so that its constants are real tensors
        self._trainer = _quiet_trainer(run.precision)
        self._module = self._build()
        _check_experts(self._module)
        self._blocks = len(find_blocks(self._module, run.block_names))

    def step(self, *, tokens: int | None = None, batch_size: int | None = None, whole: bool = False) -> Timeline:
        """Memory during one training step, with the optimizer's state and the gradients of the step before.

        In Lightning's order: forward, ``zero_grad``, backward, optimizer, write-back. If the blocks are equal, a few of
        them are traced and the rest is extrapolated.

        Args:
            tokens: Length of each sequence. Default: the run's.
            batch_size: Sequences of a micro-batch. Default: the run's.
            whole: Trace all blocks even if they are equal.

        Raises:
            PaCAError: If this process trains in a process group already.
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
        """Whether all blocks have parameters of one shape, attention of one kind, and a list of their own."""
        blocks = find_blocks(self._module, self.run.block_names)
        config = next((m.config for m in self._module.modules() if hasattr(m, "config")), None)
        kinds = getattr(config, "layer_types", None) or []
        shapes = {
            tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()) for block in blocks
        }
        return len(shapes) == 1 and len(set(kinds)) <= 1 and _container(self._module, blocks) is not None

    def _trace(self, run: TracedRun, layers: int | None) -> Timeline:
        """Trace a step with the first ``layers`` blocks, or with all."""
        module = copy.deepcopy(self._module)
        if layers is not None:
            _truncate(module, run, layers)
        with _fake_ranks(run) as mesh, fake_tensors():
            _allocate(module)
            blocks = find_blocks(module, run.block_names)
            if run.strategy is not None and mesh is not None:
                run.strategy.shard_model(module, mesh)
            optimizers = _optimizers(module, self._trainer)
            return trace_step(run, module, self._trainer.precision_plugin, optimizers, blocks)


def _check_experts(module: nn.Module) -> None:
    """Refuse stacked experts whose forward cannot be traced without data."""
    for path, owner in module.named_modules():
        stacked: list[ExpertWeight] = [child for child in owner.children() if isinstance(child, PaCAExperts)]
        stacked += [weight for _, weight in expert_weights(owner)]
        if not stacked:
            continue
        kind = experts_implementation(getattr(owner, "config", None))
        if kind == "eager":
            raise PaCAError(
                f"{path!r} loops over the experts that its tokens chose (experts_implementation='eager'), which cannot "
                "be estimated without data. Estimate with 'grouped_mm'."
            )
        dtype = str(stacked[0].weight.dtype).removeprefix("torch.")
        if kind != "batched_mm" and dtype != "bfloat16":
            raise PaCAError(
                f"{path!r} has stacked experts in {dtype}, of which PyTorch can trace the grouped product in bfloat16 "
                "only. Estimate with --trainer.precision bf16-true."
            )


@contextmanager
def _fake_ranks(run: TracedRun) -> Iterator[DeviceMesh | None]:
    """A mesh of ranks of which this process is the first, and the others do not exist; None if not sharded."""
    if run.strategy is None:
        yield None
        return
    if dist.is_initialized():
        raise PaCAError("A process group exists already. Estimate in a process that does not train.")
    init_fake_process_group(run.ranks)
    try:
        size = run.shard_size or run.ranks
        if size == run.ranks:
            yield init_device_mesh("cpu", (size,))
        else:
            yield init_device_mesh("cpu", (run.ranks // size, size), mesh_dim_names=("replicate", "shard"))
    finally:
        dist.destroy_process_group()


def _quiet_trainer(precision: str) -> Trainer:
    """A trainer for its precision plugin, and for schedules that ask it for the length of a run. It never trains."""
    with quiet("lightning.pytorch.utilities.rank_zero", logging.WARNING):  # of the devices that it finds
        return Trainer(
            accelerator="cpu",
            devices=1,
            # bf16 takes as much memory as fp16, for which a CPU has no autocast.
            precision="bf16-mixed" if precision in ("16-mixed", "16") else precision,  # type: ignore[arg-type]
            max_steps=1_000_000,  # longer than any warm-up
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def _container(module: nn.Module, blocks: list[nn.Module]) -> nn.ModuleList | None:
    """The ModuleList that holds exactly these blocks, if there is one."""
    lists = (child for child in module.modules() if isinstance(child, nn.ModuleList))
    return next((child for child in lists if list(child) == blocks), None)


def _truncate(module: nn.Module, run: TracedRun, layers: int) -> None:
    """Remove all blocks but the first ``layers``."""
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
    """Replace parameters and buffers on meta by fake ones on a device. Shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for child in module.modules():
        parameters = child.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *child.named_buffers(recurse=False, remove_duplicate=False)]:
            if id(tensor) not in made:
                empty = torch.empty_like(tensor, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                made[id(tensor)] = empty
            setattr(child, name, made[id(tensor)])


def _optimizers(module: LightningModule, trainer: Trainer) -> list[Optimizer]:
    """The module's optimizers, in whichever form it returns them."""
    module.trainer = trainer  # schedules ask it for the length of the run
    configured: Any = module.configure_optimizers()
    module.trainer = None
    if isinstance(configured, tuple):
        configured = configured[0]
    if isinstance(configured, dict):
        configured = configured["optimizer"]
    return configured if isinstance(configured, list) else [configured]
