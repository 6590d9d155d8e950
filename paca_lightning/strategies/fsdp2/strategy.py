"""The Lightning strategy that shards any LightningModule over all devices of a run."""

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
from paca_lightning.core.evaluating import reshard_units
from paca_lightning.core.private.lightning import optimizers_to_device, set_device
from paca_lightning.strategies.fsdp2.checkpoints import ShardedCheckpointStrategy
from paca_lightning.strategies.fsdp2.materializing import materialize
from paca_lightning.strategies.fsdp2.sharding import ShardingOptions, shard

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDP2Strategy(ShardedCheckpointStrategy):
    """Fully sharded data parallelism (PyTorch's ``fully_shard``) for any LightningModule: ``strategy="paca_fsdp2"``.

    Each rank holds its rows of every parameter, gradient and optimizer state, and trains on its own part of the batch.
    One block at a time is gathered. The LightningModule needs no code for sharding. It builds its model in
    ``__init__`` or in ``configure_model``, on a real device or on meta. If a model on meta has the attribute
    ``checkpoint_directory``, its weights are read from the safetensors files there; each rank reads its rows only.

    Lightning's precision plugins compute what they compute on one device. ``mixed_precision`` additionally gathers
    parameters and reduces gradients in other dtypes.

    Args:
        blocks: Class names of the modules to gather one at a time. Default: the decoder blocks that Hugging Face
            models declare. A model without blocks is gathered as a whole.
        reshard_after_forward: True frees a block's gathered parameters after its forward and gathers them again for
            its backward. False keeps them for the backward: more memory, less communication. A number gathers them
            again from that many ranks.
        shard_size: Number of ranks to shard over. Each group of that size holds the whole model. Default: all ranks.
        activation_checkpointing: Recompute each block in the backward. ``"offload"`` also keeps the blocks' inputs in
            host memory. ``"selective"`` keeps the outputs of GEMMs and attention and recomputes only the rest, which
            takes a few percent of the time.
        mixed_precision: Dtypes of gathered parameters and of the gradients' reduction.
        cpu_offload: Keep parameters, gradients and optimizer states in host memory.
        save_distributed_checkpoint: True writes a directory, to which each rank writes its rows. False writes one
            file, as a run on one device does. A run on any number of ranks resumes from either.
        process_group_backend: Backend for collectives. Default: that of the device.
        timeout: Time after which a collective fails, for example because a rank has died.
    """

    streams_checkpoints: ClassVar[bool] = True
    """Whether this strategy fills models on meta from their ``checkpoint_directory``."""

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
        """Join the process group and build the device mesh.

        Raises:
            PaCAError: If ``shard_size`` does not divide the number of ranks, or ``reshard_after_forward`` does not
                divide ``shard_size``.
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
            # The norm of offloaded gradients is reduced in host memory, which needs a backend for CPU tensors.
            backend = f"cpu:gloo,{self.root_device.type}:{backend}"
        return backend

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        """Cast, shard and fill the model, then build the optimizers."""
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
        """Shard a model in place. With ``activation_checkpointing``, its blocks are checkpointed first.

        Raises:
            PaCAError: If the model cannot be sharded, or has no blocks to checkpoint.
        """
        blocks = find_blocks(model, self.blocks)
        if not blocks:
            rank_zero_info(
                f"{type(model).__name__} declares no blocks, so all its parameters except those of PaCA layers are "
                "gathered at once. Name the classes of its layers in FSDP2Strategy(blocks=[...])."
            )
        if self.activation_checkpointing:
            if not blocks:
                raise PaCAError(
                    f"activation_checkpointing recomputes blocks, and {type(model).__name__} declares none. Name their "
                    "classes in FSDP2Strategy(blocks=[...])."
                )
            how = self.activation_checkpointing
            checkpoint_blocks(blocks, offload=how == "offload", selective=how == "selective")
        shard(model, mesh, blocks, self.options)
        # The root's parameters are gathered for these methods, as they are for its forward.
        for step in STEPS:
            register_fsdp_forward_method(model, step)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        if not self.options.cpu_offload:
            self.model.to(self.root_device)
            return
        # Parameters stay in host memory, and sharding has moved their modules' buffers. Only metrics are left.
        for module in self.model.modules():
            if next(module.parameters(), None) is None:
                module.to(self.root_device)
        set_device(self.model, self.root_device)

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Inside this context, a backward accumulates gradients without reducing them."""
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
        """Step, then free parameters that a forward without backward left gathered: they are out of date."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._reshard()
        return result

    def _reshard(self) -> None:
        """Free the gathered parameters of all units."""
        assert self.model is not None
        reshard_units(self.model)

    # No backward frees what the last forward of an evaluation gathered.
    on_validation_end = on_test_end = on_predict_end = _reshard


StrategyRegistry.register("paca_fsdp2", FSDP2Strategy, description="FSDP2 over all devices, for any LightningModule")
