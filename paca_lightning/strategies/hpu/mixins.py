"""Mixins that turn a Lightning strategy into one for HPUs: precision, process group and reductions.

Put a mixin before the Lightning strategy: ``class HPUDDPStrategy(HPUDistributedMixin, DDPStrategy)``.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path
from paca_lightning.layers.base import paca_layers
from paca_lightning.layers.bitsandbytes import check_hpu_backend
from paca_lightning.layers.experts import PaCAExperts

SUPPORTED_PRECISIONS = ("32-true", "bf16-true", "bf16-mixed")


class HPUStrategyMixin(Strategy):
    """A strategy whose device is an HPU: checks the precision, and makes mixed precision autocast on the HPU."""

    @property
    @override
    def precision_plugin(self) -> Precision:
        """The precision plugin.

        Raises:
            PaCAError: When it is set to one whose precision is not supported on HPUs.
        """
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None and plugin.precision not in SUPPORTED_PRECISIONS:
            raise PaCAError(
                f"precision={plugin.precision!r} is not supported on HPU: use 'bf16-mixed' or 'bf16-true' "
                "(Gaudi computes in bfloat16, which needs no loss scaling), or '32-true'."
            )
        if isinstance(plugin, MixedPrecision):
            plugin.device = "hpu"  # Lightning would autocast on cuda
        self._precision_plugin = plugin

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        """Check that bitsandbytes supports NF4 on HPUs if the model has such layers, then set up as Lightning does.

        Raises:
            PaCAError: If there are NF4 layers and bitsandbytes is too old for HPUs, or columns of stacked experts.
        """
        assert self.model is not None
        if path := next((path for path, layer in paca_layers(self.model) if isinstance(layer, PaCAExperts)), None):
            raise PaCAError(
                f"{clean_path(path)!r} has the weights of stacked experts, whose columns were never trained on HPUs. "
                "Leave them frozen: exclude_modules=['experts.gate_up_proj', 'experts.down_proj']."
            )
        if any(layer.base_name == "packed" for _, layer in paca_layers(self.model)):
            check_hpu_backend()
        super().setup(trainer)


class HPUDistributedMixin(HPUStrategyMixin, ParallelStrategy):
    """A strategy of several processes with one card each, which communicate over HCCL.

    For Lightning's ``DDPStrategy`` and ``ModelParallelStrategy`` and classes derived from them.
    """

    # Both classes have these attributes; their common base class does not.
    set_world_ranks: Callable[[], None]
    _process_group_backend: str | None
    _timeout: timedelta | None

    @override
    def setup_environment(self) -> None:
        """Bind the process to its card and initialise the process group, before Lightning does.

        Lightning would pass ``device_id``. A DeviceMesh then splits the world group, which HCCL does not support.
        """
        from habana_frameworks.torch.distributed import hccl  # registers the backend "hccl" with torch

        environment = self.cluster_environment
        assert environment is not None
        self.set_world_ranks()
        hccl.initialize_distributed_hpu(
            world_size=environment.world_size(), rank=environment.global_rank(), local_rank=environment.local_rank()
        )
        if not dist.is_initialized():
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
            dist.init_process_group(
                self._get_process_group_backend(),
                rank=environment.global_rank(),
                world_size=environment.world_size(),
                timeout=self._timeout,
            )
        super().setup_environment()

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: dist.ReduceOp | str | None = "mean") -> Any:
        """Reduce a tensor over all processes, in place. HCCL has no average, so a mean is a sum that is divided.

        Args:
            tensor: The tensor. Anything else is returned unchanged.
            group: The process group, by default all processes.
            reduce_op: ``"mean"`` (or ``"avg"``), ``"sum"``, or another reduction that HCCL has.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        name = reduce_op.lower() if isinstance(reduce_op, str) else reduce_op
        if name not in ("mean", "avg", dist.ReduceOp.AVG):
            return super().reduce(tensor, group, reduce_op)  # type: ignore[safe-super]
        total = super().reduce(tensor, group, "sum")  # type: ignore[safe-super]
        return total.copy_(total / dist.get_world_size(group)) if dist.is_initialized() else total

    def determine_ddp_device_ids(self) -> None:
        """Return None: with device ids, Lightning would open a CUDA stream."""

    def _get_process_group_backend(self) -> str:
        self._process_group_backend = self._process_group_backend or "hccl"
        backend: str = super()._get_process_group_backend()  # type: ignore[misc]
        return backend


class HPUFSDP2Mixin(HPUDistributedMixin):
    """A strategy that shards with FSDP2 (``fully_shard``). Gradients are reduced by sums, as HCCL has no average."""

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        """Set up as the sharding strategy does, then make all units reduce by sums."""
        super().setup(trainer)
        assert self.model is not None
        force_sum_reductions(self.model)


def force_sum_reductions(model: nn.Module) -> None:
    """Make every FSDP2 unit of a model reduce gradients by SUM and divide them itself, instead of using AVG."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
