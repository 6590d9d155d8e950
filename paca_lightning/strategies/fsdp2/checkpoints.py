"""A strategy whose checkpoints are written and read by all ranks, at a local path or a URL of fsspec."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import Optimizer
from typing_extensions import override

from paca_lightning.core.checkpoints import METADATA
from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import tensors_in
from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.restoring import by_position, check_files, load_directory, load_file
from paca_lightning.strategies.fsdp2.saving import restore_replaced, save_directory


class ShardedCheckpointStrategy(ModelParallelStrategy):
    """Lightning's strategy for sharded models, with checkpoints from which any number of ranks can resume.

    A checkpoint is a directory to which each rank writes its rows. With ``save_distributed_checkpoint=False`` it is one
    file, as a run on one device writes it. Both kinds can be loaded under either setting.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = True, **settings: Any) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **settings)
        self.save_distributed_checkpoint = save_distributed_checkpoint

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer for a checkpoint.

        For a directory it is sharded and by parameter name. For one file it is whole and by parameter number, as on
        one device, and empty on all ranks but the first.
        """
        if self.save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return by_position(get_optimizer_state_dict(self.model, optimizer, options=options))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint to a local path or a URL. One that was interrupted is never loaded.

        Raises:
            PaCAError: On all ranks, before anything is written, if one rank's disk has too little space.
            TypeError: If ``storage_options`` are given.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} does not support save_checkpoint(..., storage_options=...).")
        location = Location.of(self.broadcast(filepath))
        if location.is_local:
            self._check_space(checkpoint, location)
        if self.save_distributed_checkpoint:
            save_directory(checkpoint, location)
            return
        if location.is_directory():
            if not (location / METADATA).is_file():
                raise IsADirectoryError(f"The checkpoint path exists and is a directory: {location}")
            if self.is_global_zero:
                location.remove()
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, location.name)

    def _check_space(self, checkpoint: dict[str, Any], location: Location) -> None:
        own = sum(local(tensor).nbytes for tensor in tensors_in(checkpoint))
        needed = int(self.reduce(torch.tensor(own, device=self.root_device), reduce_op="sum"))
        free = shutil.disk_usage(next(parent for parent in Path(location.name).parents if parent.exists())).free
        if not self.reduce_boolean_decision(needed < free):
            raise PaCAError(
                f"A checkpoint of {needed / 2**20:.0f} MiB does not fit on the disk of {location.name!r} "
                f"({free / 2**20:.0f} MiB free on rank {self.global_rank}). Free space, or save to another disk."
            )

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore the model and the optimizers, and return the rest of the checkpoint.

        Raises:
            PaCAError: If there is no checkpoint, or it is damaged, or belongs to another model.
        """
        location = Location.of(self.broadcast(checkpoint_path))
        if location.is_local:
            restore_replaced(Path(location.name))
        module = self.lightning_module
        assert module is not None
        if (location / METADATA).is_file():
            if location.is_local:
                check_files(Path(location.name))
            return load_directory(location, module, self.optimizers, strict=module.strict_loading)
        if location.is_file():
            return load_file(location, module, self.optimizers, strict=module.strict_loading)
        raise PaCAError(f"{location.name!r} is neither a checkpoint file nor a directory with {METADATA}.")
