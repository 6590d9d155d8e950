"""Checkpoints to which several ranks wrote: single tensors, read by one process, without running a pickle's code."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paca_lightning.core.checkpoints import LARGEST_FILE, check_crc, is_plain, read_object
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import read_shard_list
from paca_lightning.core.reading import check_file

SHARDS = ".metadata"
"""PyTorch's name for the list of shards."""
LARGEST_LIST = 2**30
STATE = "state_dict."
"""How the names of the module's tensors begin, among those of optimizers."""


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of a sharded checkpoint, which is read when it is asked for.

    Attributes:
        directory: The checkpoint.
        name: In the state dict.
        size: Of the whole tensor.
        dtype: Of its numbers.
        shards: Where each shard begins in the tensor, and where it lies: file, first byte, number of bytes.
    """

    directory: Path
    name: str
    size: torch.Size
    dtype: torch.dtype
    shards: list[tuple[tuple[int, ...], tuple[str, int, int]]]

    def read(self) -> Tensor:
        """The whole tensor, in host memory.

        Raises:
            PaCAError: If a file is missing, a shard is damaged, or the shards do not make up the tensor.
        """
        try:
            return self._joined()
        except PaCAError:
            raise
        except Exception as error:  # of a damaged list of shards, any
            raise PaCAError(f"{self.directory}: {self.name!r} cannot be read: {error}") from error

    def _joined(self) -> Tensor:
        shards = [(offsets, self._shard(*location)) for offsets, location in self.shards]
        complete = self.size.numel() == sum(shard.numel() for _, shard in shards)  # or a huge size would be allocated
        whole = torch.empty(self.size if complete else 0, dtype=self.dtype)
        written = torch.zeros_like(whole, dtype=torch.bool)
        for offsets, shard in shards if complete else ():
            place = tuple(slice(first, first + count) for first, count in zip(offsets, shard.shape, strict=True))
            complete = complete and shard.dtype == self.dtype and whole[place].shape == shard.shape
            whole[place], written[place] = shard, True
        if not (complete and written.all()):
            raise PaCAError(f"{self.directory}: the shards of {self.name!r} do not make up the tensor. It is damaged.")
        return whole

    def _shard(self, file_name: str, start: int, length: int) -> Tensor:
        file = self.directory / file_name
        if Path(file_name).name != file_name or length < 0:
            raise PaCAError(
                f"{self.directory / SHARDS} is damaged: it names {file_name!r}, which is no file beside it."
            )
        check_file(file, LARGEST_FILE)
        with file.open("rb") as stream:
            stream.seek(start)
            content = io.BytesIO(stream.read(length))
        check_crc(content, f"{file} ({self.name!r})")
        content.seek(0)
        shard = read_object(content, str(file))
        if not is_plain(shard):
            raise PaCAError(f"{file}: a shard of {self.name!r} is no plain tensor. It is damaged.")
        return shard


def sharded_tensors(directory: Path) -> dict[str, ShardedTensor]:
    """The tensors in the state dict of a sharded checkpoint, by name.

    Raises:
        PaCAError: If the list of shards is missing or damaged, or holds objects of other classes.
    """
    try:
        check_file(directory / SHARDS, LARGEST_LIST)
        with (directory / SHARDS).open("rb") as stream:
            listed = read_shard_list(stream)
        shards: dict[str, list[Any]] = {}
        taken = set()
        for index, where in listed.storage_data.items():
            location = (where.relative_path, where.offset, where.length)
            shards.setdefault(index.fqn, []).append((tuple(index.offset or ()), location))
            taken.add(location[:2])
        if len(taken) < len(listed.storage_data):
            raise PaCAError(f"{directory / SHARDS} is damaged: two shards lie in one place.")
        return {
            (name := full_name.removeprefix(STATE)): ShardedTensor(
                directory, name, torch.Size(entry.size), entry.properties.dtype, shards[full_name]
            )
            for full_name, entry in listed.state_dict_metadata.items()
            if full_name.startswith(STATE) and hasattr(entry, "size")
        }
    except PaCAError:
        raise
    except Exception as error:  # of a damaged pickle, any
        raise PaCAError(f"{directory / SHARDS} cannot be read: {error}") from error
