"""Lightning checkpoints as files: which kind one is, whether its bytes are intact, reading it without running code."""

import os
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import check_file

METADATA = "meta.pt"
"""Lightning's name for the file of what is not sharded: loops, callbacks, ..."""
SUFFIX = ".ckpt"
LARGEST_FILE = 4 * 2**40


def is_checkpoint_directory(path: Path) -> bool:
    """Whether a directory is a sharded checkpoint."""
    return (path / METADATA).is_file()


def read_safely(file: str | os.PathLike[str] | IO[bytes], name: str) -> dict[str, Any]:
    """The content of a checkpoint file. Its tensors stay in a local file until they are used.

    Raises:
        PaCAError: As :func:`read_object`, or if it is something else than a checkpoint.
    """
    content = read_object(file, name)
    if not isinstance(content, dict):
        raise PaCAError(f"The checkpoint {name!r} holds {type(content).__name__}, not what Lightning writes.")
    return content


def read_object(file: str | os.PathLike[str] | IO[bytes], name: str) -> Any:
    """What ``torch.save`` wrote, in host memory.

    Args:
        file: A local path, or an open file.
        name: The checkpoint, for messages.

    Raises:
        PaCAError: If it is damaged, or holds objects that are not safe to load.
    """
    mapped = isinstance(file, str | os.PathLike) and zipfile.is_zipfile(file)
    try:
        return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # of a damaged pickle, any
        reason = str(error) or type(error).__name__
        if found := re.search(r"GLOBAL (\S+)", reason):
            # Lightning (2.6) does not pass weights_only=False on to strategies that restore after their setup.
            reason = (
                f"it holds an object of {found[1]} (in the hyperparameters or a callback's state). Allow the classes "
                "that you trust with torch.serialization.add_safe_globals([...]) before the run."
            )
        raise PaCAError(f"The checkpoint {name!r} cannot be read: {reason}") from error


def is_plain(value: Any) -> bool:
    """Whether something is a tensor with all its numbers in host memory: a hostile file may bring huge views of few."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and value.nbytes <= value.untyped_storage().nbytes()


def check_crc(file: Path | IO[bytes], name: str | None = None) -> None:
    """Compare the CRC-32 of each record of what ``torch.save`` wrote, which PyTorch does not look at.

    Args:
        file: A local path, or an open file.
        name: For messages. Default: the path.

    Raises:
        PaCAError: If one differs, or the file is cut off or was not written by ``torch.save``.
    """
    name = name or str(file)
    try:
        if isinstance(file, Path):
            check_file(file.resolve(), LARGEST_FILE)
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            damaged = packed[0] if packed else archive.testzip()
    except PaCAError:
        raise
    except Exception as error:  # of a damaged archive, any
        raise PaCAError(f"{name} is cut off, or no checkpoint that PyTorch wrote: {error}") from error
    if damaged is not None:
        raise PaCAError(
            f"{name} is not what was saved: its record {damaged!r} was damaged or changed since. Copy the checkpoint "
            "again, or take another one."
        )
