"""The directory that a callback writes: found, writable, and of no other callback of its kind."""

from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable


class Writes(Protocol):
    """A callback that writes a directory.

    Attributes:
        dirpath: Which, if it was given one.
    """

    dirpath: str | None


def own_directory(callback: Writes, trainer: Trainer, name: str) -> Path:
    """The directory of a callback.

    Args:
        callback: It gets ``name`` in the logger's directory if its ``dirpath`` is None.
        trainer: Of the run.
        name: Of the directory.

    Raises:
        PaCAError: If it cannot be written, or another callback of the same class writes there.
    """
    kind = type(callback).__name__
    directory = _directory(callback, trainer, name)
    check_writable(directory, f"{kind}(dirpath=...)")
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others: list[Any] = [other for other in callbacks if isinstance(other, type(callback)) and other is not callback]
    if any(_directory(other, trainer, name) == directory for other in others):
        raise PaCAError(f"Two callbacks {kind} write to {str(directory)!r}. Give one a `dirpath`.")
    return directory


def _directory(callback: Writes, trainer: Trainer, name: str) -> Path:
    return Path(callback.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / name)
