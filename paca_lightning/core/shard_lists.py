"""The list of shards of a sharded checkpoint (``.metadata``): a pickle, read as inert records and checked.

PyTorch unpickles it without limits. Here each class that the pickle names becomes a record that only keeps what it is
given: no class of the file is made or changed, no function of it is called.
"""

import pickle
from dataclasses import dataclass
from math import prod
from pathlib import PurePath
from typing import IO, Any

import torch

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import SHARD_LIST_CLASSES

SHARDS = ".metadata"
"""PyTorch's name for the list of shards."""
LARGEST_LIST = 2**30


@dataclass(frozen=True)
class Place:
    """Where a shard lies: a file beside the list, its first byte, its number of bytes."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Shard:
    """A part of a tensor: where it begins in each dimension, its shape, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class ListedTensor:
    """A tensor of a sharded checkpoint. Its shards make it up, and no two overlap."""

    size: tuple[int, ...]
    dtype: torch.dtype
    shards: list[Shard]


@dataclass(frozen=True)
class ShardList:
    """What a sharded checkpoint holds.

    Attributes:
        tensors: By name.
        values: Where each value that is no tensor lies, by name.
    """

    tensors: dict[str, ListedTensor]
    values: dict[str, Place]


def read_shard_list(stream: IO[bytes], name: str) -> ShardList:
    """The list of shards in an open file.

    Args:
        stream: The file's content.
        name: The file, for messages.

    Raises:
        PaCAError: If it is damaged: it names other classes than :data:`SHARD_LIST_CLASSES` and dtypes, or files that
            are not beside it, or shards that do not make up their tensor.
    """
    try:
        records = _Records(stream)
        return _parse(records.load(), records)
    except PaCAError as error:
        raise PaCAError(f"{name} is damaged: {error}") from error
    except Exception as error:  # of a damaged pickle, any
        raise PaCAError(f"{name} cannot be read: {error}") from error


class _Record:
    """What the pickle gives an object: arguments and state."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Records(pickle.Unpickler):
    """Makes records in place of all objects, with a class of their own for each class that the pickle names."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._kinds: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if name not in SHARD_LIST_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a list of shards")
        return self._kinds.setdefault(name, type(name, (_Record,), {}))

    def is_a(self, name: str, value: Any) -> bool:
        """Whether a value is a record of a class."""
        return name in self._kinds and isinstance(value, self._kinds[name])


def _parse(listed: Any, records: _Records) -> ShardList:
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, where in listed.state["storage_data"].items():
        offset = index.state.get("offset")
        places[_text(index.state["fqn"]), None if offset is None else _numbers(offset)] = _place(where.state)
    if len({(place.file, place.start) for place in places.values()}) < len(places):
        raise PaCAError("two shards lie in one place.")
    tensors, values = {}, {}
    for name, entry in listed.state["state_dict_metadata"].items():
        if records.is_a("BytesStorageMetadata", entry):
            values[_text(name)] = places[name, None]
            continue
        chunks = [(_numbers(c.state["offsets"]), _numbers(c.state["sizes"])) for c in entry.state["chunks"]]
        shards = [
            Shard(offsets, sizes, p) for offsets, sizes in chunks if (p := places.get((name, offsets))) is not None
        ]
        tensor = ListedTensor(_numbers(entry.state["size"]), entry.state["properties"].state[0], shards)
        _check_cover(_text(name), tensor)
        tensors[name] = tensor
    return ShardList(tensors, values)


def _check_cover(name: str, tensor: ListedTensor) -> None:
    """Raise unless the shards are disjoint parts of a tensor, and all of it."""
    size, shards = tensor.size, sorted(tensor.shards, key=lambda shard: shard.offsets)
    inside = all(
        len(shard.offsets) == len(shard.sizes) == len(size)
        and all(first + count <= end for first, count, end in zip(shard.offsets, shard.sizes, size, strict=True))
        and prod(shard.sizes) * tensor.dtype.itemsize <= shard.place.length
        for shard in shards
    )
    if not inside or sum(prod(shard.sizes) for shard in shards) != prod(size) or _overlap(shards):
        raise PaCAError(f"the shards of {name!r} do not make up the tensor.")


def _overlap(shards: list[Shard]) -> bool:
    """Whether two shards have an element in common.

    Args:
        shards: In the order of their offsets, so that only those are compared that share rows.
    """
    filled = [shard for shard in shards if prod(shard.sizes)]
    for number, one in enumerate(filled):
        for other in filled[number + 1 :]:
            if one.sizes and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            starts = [max(pair) for pair in zip(one.offsets, other.offsets, strict=True)]
            ends = [
                min(a + m, b + n) for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            ]
            if all(start < end for start, end in zip(starts, ends, strict=True)):
                return True
    return False


def _place(state: dict[str, Any]) -> Place:
    place = Place(_text(state["relative_path"]), *_checked((state["offset"], state["length"])))
    if PurePath(place.file).name != place.file or place.file == "..":
        raise PaCAError(f"it names {place.file!r}, which is no file beside it.")
    if state.get("transform_descriptors") is not None:
        raise PaCAError(f"it says that a shard in {place.file!r} is compressed, which no checkpoint of ours is.")
    return place


def _numbers(size: Any) -> tuple[int, ...]:
    """The numbers in the record of a ``torch.Size``."""
    (numbers,) = size.arguments
    return _checked(numbers)


def _checked(numbers: Any) -> tuple[int, ...]:
    if any(type(number) is not int or number < 0 for number in numbers):
        raise PaCAError(f"{numbers!r:.100} are no sizes or places.")
    return tuple(numbers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PaCAError(f"{value!r:.100} is no name.")
    return value
