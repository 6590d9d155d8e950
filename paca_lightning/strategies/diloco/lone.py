"""What a strategy is to Lightning whose process trains alone: one device, one rank, collectives that do nothing."""

from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override


class LoneStrategy(ParallelStrategy):
    """A run of one process on one device, which shares training rows with other runs as ranks do."""

    is_distributed = True  # Lightning asks whether to share the rows of plain data loaders

    @property
    @override
    def root_device(self) -> torch.device:
        """The device that this replica trains on."""
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    @property
    @override
    def world_size(self) -> int:
        """1: to Lightning, a replica is a run of its own."""
        return 1

    @property
    @override
    def global_rank(self) -> int:
        """0, as of any run on one device."""
        return 0

    @override
    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """The tensor itself: metrics are each replica's own."""
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """The tensor itself."""
        return tensor

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object itself."""
        return obj

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: replicas meet in exchanges alone."""

    @override
    def model_to_device(self) -> None:
        """Move the model to the replica's device."""
        assert self.model is not None
        self.model.to(self.root_device)
