"""Reading a sharded checkpoint's shards for ``torch.distributed.checkpoint``, without running code of the files."""

import io
import os
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future
from typing_extensions import override

from paca_lightning.core.checkpoints import LARGEST_FILE, read_object
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import check_file
from paca_lightning.core.shard_lists import LARGEST_LIST, SHARDS, ShardList, read_shard_list
from paca_lightning.core.sharded_checkpoints import read_tensor, shard_content
from paca_lightning.strategies.fsdp2.location import Location


def shard_list_of(location: Location) -> ShardList:
    """The list of shards of a checkpoint at a local path or a URL.

    Raises:
        PaCAError: If it is missing or damaged.
    """
    file = location / SHARDS
    try:
        if file.is_local:
            check_file(Path(file.name), LARGEST_LIST)
        with file.open("rb") as stream:
            return read_shard_list(stream, file.name)
    except OSError as error:
        raise PaCAError(f"{file} cannot be read: {error}") from error


class ShardReader(StorageReader):
    """Reads shards for PyTorch, which would unpickle the list of shards without limits.

    The CRC-32 of each shard that is read is compared.

    Args:
        location: The checkpoint.
        listed: What it holds.
    """

    def __init__(self, location: Location, listed: ShardList) -> None:
        self._location, self._listed = location, listed

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds, in PyTorch's classes."""
        held: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: TensorStorageMetadata(
                TensorProperties(tensor.dtype),
                torch.Size(tensor.size),
                [ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes)) for shard in tensor.shards],
            )
            for name, tensor in self._listed.tensors.items()
        }
        return Metadata(held | dict.fromkeys(self._listed.values, BytesStorageMetadata()))

    @override
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @override
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs, file by file."""
        tensors, values = self._listed.tensors, self._listed.values
        shards = {(name, shard.offsets): shard for name, tensor in tensors.items() for shard in tensor.shards}

        def place(item: ReadItem) -> tuple[str, int]:
            index = item.storage_index
            where = values[index.fqn] if item.type == LoadItemType.BYTE_IO else shards[_key(index)].place
            return where.file, where.start

        for file_name, items in groupby(sorted(plan.items, key=place), key=lambda item: place(item)[0]):
            file = self._location / file_name
            if file.is_local:
                check_file(Path(file.name), LARGEST_FILE)
            with file.open("rb") as stream:
                for item in items:
                    name = item.storage_index.fqn
                    described = f"{file} ({name!r})"
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, shard_content(stream, values[name], described))
                        continue
                    shard = shards[_key(item.storage_index)]
                    tensor = read_tensor(stream, shard.place, described, tensors[name].dtype, shard.sizes)
                    _copy_part(tensor, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    @override
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class PlainPlanner(DefaultLoadPlanner):
    """Loads values that are no tensors with ``weights_only=True``. PyTorch's planner runs any code in them."""

    @override
    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for name, value in self.state_dict.items():
            if isinstance(value, Tensor) and isinstance(
                self.metadata.state_dict_metadata.get(name), BytesStorageMetadata
            ):
                raise PaCAError(f"{name!r} is a tensor here and none in the checkpoint. It is damaged.")
        return super().create_local_plan()

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        holder: Any = self.original_state_dict
        *path, last = self.mappings[name]
        for key in path:
            holder = holder[key]
        holder[last] = read_object(value, name)


def _key(index: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(index.offset or ())


def _copy_part(tensor: Tensor, item: ReadItem, planner: LoadPlanner) -> None:
    """Copy the part of a shard that this rank holds into its tensor."""
    for dimension, (first, count) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        tensor = tensor.narrow(dimension, first, count)
    target = planner.resolve_tensor(item).detach()
    target.copy_(tensor)
    planner.commit_tensor(item, target)
