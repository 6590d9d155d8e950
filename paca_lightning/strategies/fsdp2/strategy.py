"""FSDP2Strategy: shards any LightningModule over all devices of a run."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.optim import Optimizer
from typing_extensions import override

from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import optimizers_to_device, set_device
from paca_lightning.strategies.fsdp2.checkpoints import ShardedCheckpointStrategy
from paca_lightning.strategies.fsdp2.materializing import materialize
from paca_lightning.strategies.fsdp2.sharding import ShardingOptions, shard

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDP2Strategy(ShardedCheckpointStrategy):
    """Fully sharded data parallelism (PyTorch's ``fully_shard``) for any LightningModule: ``strategy="paca_fsdp2"``.

    Every rank holds its rows of each parameter, of its gradient and of its optimizer state, and its own part of the
    batch. One block at a time is gathered. The module needs no code for it, and may build its model in ``__init__``
    or ``configure_model``, on the meta device too: weights come from the safetensors checkpoint in
    ``checkpoint_directory`` of the model, if it has that attribute, of which each rank reads its rows only.

    Lightning's precision plugins work as on one device, and are computed alike; ``mixed_precision`` gathers and
    reduces in other dtypes on top.

    Args:
        blocks: Class names of the modules to gather one at a time. Default: the decoder blocks that Hugging Face
            models declare; a model that declares none is gathered as a whole.
        reshard_after_forward: Free a block's gathered parameters after its forward. False keeps them for the
            backward: more memory, less communication. A number gathers them again from that many ranks.
        shard_size: Ranks to shard over; groups of that size hold copies. Default: all ranks.
        activation_checkpointing: Recompute each block in the backward. ``"offload"`` also keeps the blocks' inputs in
            host memory; ``"selective"`` keeps the outputs of matrix products and of attention and recomputes only the
            rest, in a few percent of the time.
        mixed_precision: Dtypes of gathered parameters and of the gradients' reduction.
        cpu_offload: Keep parameters, gradients and optimizer states in host memory.
        save_distributed_checkpoint: Write a directory, each rank its rows. False writes one file, as a run on one
            device does. Runs on any number of ranks resume from either.
        process_group_backend: Default: that of the device.
        timeout: After which collectives give up, if a rank has died.
    """

    streams_checkpoints: ClassVar[bool] = True
    """Whether models may be built on meta, with the attribute ``checkpoint_directory``."""

    def __init__(
        self,
        blocks: list[str] | None = None,
        reshard_after_forward: bool | int = True,
        shard_size: int | None = None,
        activation_checkpointing: bool | Literal["offload", "selective"] = False,
        mixed_precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.blocks = blocks
        self.shard_size = shard_size
        self.activation_checkpointing = activation_checkpointing
        self.options = ShardingOptions(
            reshard_after_forward=reshard_after_forward, mixed_precision=mixed_precision, cpu_offload=cpu_offload
        )
        self._sharding_mesh: DeviceMesh | None = None

    @override
    def setup_environment(self) -> None:
        """Joins the process group and lays out the mesh.

        Raises:
            PaCAError: If ``shard_size`` does not divide the number of ranks.
        """
        world_size = self.num_nodes * self.num_processes
        shard_size = self.shard_size or world_size
        for name, size, whole in (
            ("shard_size", shard_size, world_size),
            ("reshard_after_forward", int(self.options.reshard_after_forward), shard_size),
        ):
            if size < 0 or size > whole or (size > 1 and whole % size):
                raise PaCAError(
                    f"{name}={size} does not divide {whole} ranks (devices={self.num_processes}, "
                    f"num_nodes={self.num_nodes}). Use one of {[n for n in range(1, whole + 1) if whole % n == 0]}."
                )
        self._data_parallel_size = world_size
        super().setup_environment()
        if shard_size == world_size:
            self._sharding_mesh = self.device_mesh["data_parallel"]
        else:
            self._sharding_mesh = init_device_mesh(
                self.root_device.type, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
            )

    @override
    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        if self.options.cpu_offload and self.root_device.type != "cpu" and ":" not in backend:
            # The norm of offloaded gradients is reduced in host memory.
            backend = f"cpu:gloo,{self.root_device.type}:{backend}"
        return backend

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        """Casts, shards and fills the model, then builds the optimizers."""
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if not isinstance(self.model, FSDPModule):
            self.model = self.precision_plugin.convert_module(self.model)
            assert self._sharding_mesh is not None
            self.shard_model(self.model, self._sharding_mesh)
        materialize(self.model, self.root_device, cpu_offload=self.options.cpu_offload)
        self.model_to_device()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting and not self.options.cpu_offload:
            optimizers_to_device(self.optimizers, self.root_device)

    def shard_model(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Checkpoint the blocks of a model if asked, and shard it, in place.

        Raises:
            PaCAError: If it cannot be sharded, or has no blocks to checkpoint.
        """
        blocks = find_blocks(model, self.blocks)
        if not blocks:
            rank_zero_info(
                f"{type(model).__name__} declares no blocks, so all parameters but those of PaCA layers are gathered "
                "at once. Name the classes of its layers in FSDP2Strategy(blocks=[...])."
            )
        if self.activation_checkpointing:
            if not blocks:
                raise PaCAError(
                    "activation_checkpointing needs blocks to recompute. Name their classes in blocks=[...]."
                )
            how = self.activation_checkpointing
            checkpoint_blocks(blocks, offload=how == "offload", selective=how == "selective")
        shard(model, mesh, blocks, self.options)
        # Parameters in no other unit are gathered for these methods, as for a forward.
        for step in STEPS:
            register_fsdp_forward_method(model, step)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        if not self.options.cpu_offload:
            self.model.to(self.root_device)
            return
        # Sharding has moved buffers already, and the parameters stay. What is left has neither: metrics.
        for module in self.model.modules():
            if next(module.parameters(), None) is None:
                module.to(self.root_device)
        set_device(self.model, self.root_device)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Backwards inside accumulate gradients without reducing them."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "pl.LightningModule | nn.Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Steps, then frees parameters that were gathered since the last backward: they are older than the step."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._reshard()
        return result

    def _reshard(self) -> None:
        """Free all gathered parameters."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # An evaluation leaves gathered what a backward would have freed.
    on_validation_end = on_test_end = on_predict_end = _reshard


StrategyRegistry.register("paca_fsdp2", FSDP2Strategy, description="FSDP2 over all devices, for any LightningModule")
