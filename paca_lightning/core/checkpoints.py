"""Lightning checkpoints as files: which kind one is, whether its bytes are intact, reading it without running code."""

import os
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

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
    """The content of a checkpoint file. Its tensors lie in host memory, or stay in the file until they are used.

    Args:
        file: A local path, or an open file.
        name: The checkpoint, for messages.

    Raises:
        PaCAError: If it is damaged, or holds objects that are not safe to load.
    """
    mapped = isinstance(file, str | os.PathLike) and zipfile.is_zipfile(file)
    try:
        content: Any = torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # of a damaged pickle, any
        reason = str(error) or type(error).__name__
        if found := re.search(r"GLOBAL (\S+)", reason):
            # Lightning (2.6) does not pass weights_only=False on to strategies that restore after their setup.
            reason = (
                f"it holds an object of {found[1]} (in the hyperparameters or a callback's state). Allow the classes "
                "that you trust with torch.serialization.add_safe_globals([...]) before the run."
            )
        raise PaCAError(f"The checkpoint {name!r} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise PaCAError(f"The checkpoint {name!r} holds {type(content).__name__}, not what Lightning writes.")
    return content


def check_crc(file: Path) -> None:
    """Compare the CRC-32 of each record of a checkpoint file, which PyTorch writes and does not look at.

    Raises:
        PaCAError: If one differs, or the file is cut off or was not written by ``torch.save``.
    """
    try:
        check_file(file.resolve(), LARGEST_FILE)
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            damaged = packed[0] if packed else archive.testzip()
    except PaCAError:
        raise
    except Exception as error:  # of a damaged archive, any
        raise PaCAError(f"{file} is cut off, or no checkpoint that PyTorch wrote: {error}") from error
    if damaged is not None:
        raise PaCAError(
            f"{file} is not what was saved: its record {damaged!r} was damaged or changed since. Copy the checkpoint "
            "again, or take another one."
        )
