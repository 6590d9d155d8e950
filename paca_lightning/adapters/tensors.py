"""The tensors of an adapter directory: read, and checked by themselves, before a model is at hand."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paca_lightning.adapters.files import PREFIX, SETTINGS, TENSORS
from paca_lightning.core.checksums import tensor_checksum
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import check_file

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
    """

    indices: dict[str, Tensor]
    deltas: dict[str, Tensor]
    whole: dict[str, Tensor]


def read_tensors(directory: Path, checksums: Mapping[str, str] | None) -> AdapterTensors:
    """The tensors of an adapter, each checked by itself.

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
    try:
        check_file(file, LARGEST_FILE)
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (no mapping)
                name = key.removeprefix(PREFIX)
                if name in tensors:
                    raise PaCAError(f"{file} has {name!r} twice, with and without {PREFIX!r}. It is damaged.")
                tensors[name] = opened.get_tensor(key)
    except FileNotFoundError as error:
        raise PaCAError(f"{file} is missing: {str(file.parent)!r} is not a complete adapter directory.") from error
    except (OSError, SafetensorError, AttributeError, RuntimeError) as error:  # the last two: dtypes torch has not
        raise PaCAError(f"{file} is damaged or truncated: {error}") from error
    return tensors


def _check_sums(tensors: Mapping[str, Tensor], checksums: Mapping[str, str]) -> None:
    for name in sorted(tensors.keys() ^ checksums.keys()):
        raise PaCAError(f"{SETTINGS} and {TENSORS} disagree about {name!r}: the adapter is damaged. Save it again.")
    for name, tensor in tensors.items():
        if tensor_checksum(tensor) != checksums[name]:
            raise PaCAError(
                f"{TENSORS}: {name!r} is not what was saved: its checksum differs, so the file was damaged or changed "
                "since. Copy the adapter again, or save it again."
            )
