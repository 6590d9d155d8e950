"""The tensors of an adapter directory: read, and checked by themselves, before a model is at hand."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paca_lightning.adapters.files import PREFIX, SETTINGS, TENSORS
from paca_lightning.adapters.foreign import foreign_config, foreign_tensors
from paca_lightning.core.checksums import tensor_checksum
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import check_file

PICKLE = "adapter_model.bin"
LARGEST_FILE = 64 * 2**30
LARGEST_DELTA = 1e6
LARGEST_VALUE = 1e18  # of modules trained whole, and of running statistics, which may be of any unit
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter.

    Attributes:
        indices: Shape (r,), int64, by layer path.
        deltas: Shape (out_features, r), or (experts, out_features, r), by layer path.
        whole: Those of modules trained whole and what else had changed, by name.
        absolute: Whether ``deltas`` are no updates but the trained columns over the scaling, as the fork of PaCA's
            authors writes them: see ``absolute.py``.
    """

    indices: dict[str, Tensor]
    deltas: dict[str, Tensor]
    whole: dict[str, Tensor]
    absolute: bool = False


def read_tensors(directory: Path, checksums: Mapping[str, str] | None) -> AdapterTensors:
    """The tensors of an adapter of ours, each checked by itself.

    Args:
        directory: The adapter.
        checksums: By name, as ``paca_lightning.json`` has them; None: there are none to verify.

    Raises:
        PaCAError: If the file is missing or damaged, a tensor is missing or twice there, its bytes are not those that
            were saved, or its dtype, shape or values are none of a delta or of indices.
    """
    file = directory / TENSORS
    tensors = load_tensors(file)
    if checksums is not None:
        _check_sums(tensors, checksums)
    return checked_tensors(tensors, file)


def read_foreign(directory: Path, peft: Mapping[str, Any]) -> tuple[PaCAConfig, AdapterTensors]:
    """The settings and tensors of an adapter that another program wrote.

    Args:
        directory: The adapter.
        peft: The content of its ``adapter_config.json``.

    Raises:
        PaCAError: As :func:`read_tensors`, and if its settings mean nothing here.
    """
    file = directory / TENSORS
    tensors = load_tensors(file)
    config = foreign_config(peft, list(tensors), directory)
    named, absolute = foreign_tensors(tensors, config, file)
    return config, replace(checked_tensors(named, file), absolute=absolute)


def checked_tensors(tensors: Mapping[str, Tensor], file: str | os.PathLike[str]) -> AdapterTensors:
    """The tensors of an adapter, each checked by itself.

    Args:
        tensors: By name from the base model.
        file: What they were read from, for messages.

    Raises:
        PaCAError: If one is missing, or its dtype, shape or values are none of a delta or of indices.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS, *INTEGERS):
            raise PaCAError(f"{file}: {name!r} is {tensor.dtype}, which no adapter holds. It is damaged.")
    found: dict[str, dict[str, Tensor]] = {"paca_indices": {}, "paca_delta": {}}
    others = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        if kind in found:
            found[kind][path] = tensor
        else:
            others[name] = tensor
    for path in sorted(found["paca_indices"].keys() ^ found["paca_delta"].keys()):
        raise PaCAError(f"{file} lacks the indices or the delta of {path!r}.")
    for path, delta in found["paca_delta"].items():
        if delta.dtype not in FLOATS:
            raise PaCAError(
                f"{file}: the delta of {path!r} is {delta.dtype}, no floating-point numbers. It is damaged."
            )
        if delta.dim() not in (2, 3) or found["paca_indices"][path].dim() != 1:
            shapes = tuple(delta.shape), tuple(found["paca_indices"][path].shape)
            raise PaCAError(f"{file}: delta and indices of {path!r} have shapes {shapes}, no matrix and list.")
    if (problem := implausible(tensors)) is not None:
        raise PaCAError(f"{file}: {problem}.")
    return AdapterTensors(found["paca_indices"], found["paca_delta"], others)


def implausible(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the values of the first tensor that no sound training leaves; None if all are plausible."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        shown = name.removeprefix(PREFIX)
        low, high = (float(bound) for bound in torch.aminmax(tensor))
        largest = max(-low, high)
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"{shown!r} has NaN or Inf"
        if largest > (LARGEST_DELTA if name.endswith(".paca_delta") else LARGEST_VALUE):
            return f"{shown!r} has values as large as {largest:.3g}, which no sound training leaves"
    return None


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, without PEFT's prefix.

    Raises:
        PaCAError: If it is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    with _opened(file) as opened:
        for key in opened.keys():  # noqa: SIM118  (no mapping)
            name = key.removeprefix(PREFIX)
            if name in tensors:
                raise PaCAError(f"{file} has {name!r} twice, with and without {PREFIX!r}. It is damaged.")
            tensors[name] = opened.get_tensor(key)
    return tensors


def tensor_names(file: Path) -> list[str]:
    """The names of a file's tensors, without PEFT's prefix, from its header alone.

    Raises:
        PaCAError: If it is missing or damaged.
    """
    with _opened(file) as opened:
        return [key.removeprefix(PREFIX) for key in opened.keys()]  # noqa: SIM118  (no mapping)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A file of tensors, checked first. What safetensors says of a damaged one is said as our error."""
    try:
        check_file(file, LARGEST_FILE)
        with safe_open(file, framework="pt") as opened:
            yield opened
    except FileNotFoundError as error:
        pickled = file.parent / PICKLE
        hint = (
            f", and {PICKLE} is a pickle, which may run code when it is read: save it with safe_serialization=True"
            if pickled.exists()
            else ""
        )
        raise PaCAError(
            f"{file} is missing: {str(file.parent)!r} is not a complete adapter directory{hint}."
        ) from error
    except (OSError, SafetensorError, AttributeError, RuntimeError) as error:  # the last two: dtypes torch has not
        raise PaCAError(f"{file} is damaged or truncated: {error}") from error


def _check_sums(tensors: Mapping[str, Tensor], checksums: Mapping[str, str]) -> None:
    for name in sorted(tensors.keys() ^ checksums.keys()):
        raise PaCAError(f"{SETTINGS} and {TENSORS} disagree about {name!r}: the adapter is damaged. Save it again.")
    for name, tensor in tensors.items():
        if tensor_checksum(tensor) != checksums[name]:
            raise PaCAError(
                f"{TENSORS}: {name!r} is not what was saved: its checksum differs, so the file was damaged or changed "
                "since. Copy the adapter again, or save it again."
            )
