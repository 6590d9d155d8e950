"""Checkpoints to which several ranks wrote: single tensors, read by one process, without running a pickle's code."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from paca_lightning.core.checkpoints import LARGEST_FILE, check_crc, is_plain, read_object
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import check_file
from paca_lightning.core.shard_lists import LARGEST_LIST, SHARDS, ListedTensor, Place, read_shard_list

STATE = "state_dict."
"""How the names of the module's tensors begin, among those of optimizers."""


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of a sharded checkpoint, which is read when it is asked for.

    Attributes:
        directory: The checkpoint.
        name: In the state dict.
        listed: What the list of shards tells of it.
    """

    directory: Path
    name: str
    listed: ListedTensor

    def read(self) -> Tensor:
        """The whole tensor, in host memory.

        Raises:
            PaCAError: If a file is missing, or a shard is damaged.
        """
        try:
            whole = torch.empty(self.listed.size, dtype=self.listed.dtype)
            for shard in self.listed.shards:
                file = self.directory / shard.place.file
                check_file(file, LARGEST_FILE)
                with file.open("rb") as stream:
                    rows = read_tensor(stream, shard.place, f"{file} ({self.name!r})", self.listed.dtype, shard.sizes)
                where = zip(shard.offsets, shard.sizes, strict=True)
                whole[tuple(slice(first, first + count) for first, count in where)] = rows
        except PaCAError:
            raise
        except Exception as error:  # a missing file, a size that no memory holds, ...
            raise PaCAError(f"{self.directory}: {self.name!r} cannot be read: {error}") from error
        return whole


def read_tensor(stream: IO[bytes], place: Place, name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
    """A shard, in host memory.

    Args:
        stream: The file that holds it.
        place: Where in the file.
        name: For messages.
        dtype: That it must have.
        sizes: Shape that it must have.

    Raises:
        PaCAError: If it is damaged, or something else.
    """
    tensor = read_object(shard_content(stream, place, name), name)
    if not is_plain(tensor) or tensor.dtype != dtype or tuple(tensor.shape) != sizes:
        raise PaCAError(f"{name}: the shard is no plain tensor of {dtype} and shape {sizes}. It is damaged.")
    return tensor


def shard_content(stream: IO[bytes], place: Place, name: str) -> io.BytesIO:
    """The bytes of a place, which ``torch.save`` wrote.

    Raises:
        PaCAError: If the CRC-32 of one of its records differs, or it is cut off.
    """
    stream.seek(place.start)
    content = io.BytesIO(stream.read(place.length))
    check_crc(content, name)
    content.seek(0)
    return content


def sharded_tensors(directory: Path) -> dict[str, ShardedTensor]:
    """The tensors in the state dict of a sharded checkpoint, by name.

    Raises:
        PaCAError: If the list of shards is missing or damaged, or holds objects of other classes.
    """
    path = directory / SHARDS
    try:
        check_file(path, LARGEST_LIST)
        with path.open("rb") as stream:
            listed = read_shard_list(stream, str(path))
    except OSError as error:
        raise PaCAError(f"{path} cannot be read: {error}") from error
    return {
        (name := full_name.removeprefix(STATE)): ShardedTensor(directory, name, tensor)
        for full_name, tensor in listed.tensors.items()
        if full_name.startswith(STATE)
    }
