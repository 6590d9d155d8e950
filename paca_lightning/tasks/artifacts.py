"""Files that a run leaves behind: where they go, and written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from paca_lightning.errors import PaCAError


def run_directory(trainer: Trainer) -> Path:
    """The directory of a run: its logger's, or else the trainer's ``default_root_dir``. Call it on all processes.

    Raises:
        PaCAError: If it cannot be created or written.
    """
    directory = Path(trainer.log_dir or trainer.default_root_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError as error:
        raise PaCAError(f"The run directory {directory} cannot be created: {error}. Choose another.") from error
    if not writable:
        raise PaCAError(f"The run directory {directory} cannot be written. Change its permissions, or choose another.")
    return directory


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place at the end, unless there is an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
