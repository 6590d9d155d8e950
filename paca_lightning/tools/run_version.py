"""The version of a run: the directory that is its own, though other runs start at the same time."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import has_fixed_version, next_version

CONFIG_NAME = "config.yaml"
ATTEMPTS = 1000


def claim_versions(trainer: Trainer) -> list[Path]:
    """Create the directory of each local logger's version, so that a run that starts now takes another one.

    Creating a directory is atomic, and looking for a free number is not. Only the first rank claims: the others are
    told its directories.

    Returns:
        The directories that were created.

    Raises:
        PaCAError: If a version that the user gave has a run's files in it.
    """
    created: list[Path] = []
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return created
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger | TensorBoardLogger) or "://" in str(logger.save_dir):
            continue
        if has_fixed_version(logger):
            _check_free(logger)
        else:
            created.append(_claim(logger))
    return created


def remove_empty(directories: list[Path]) -> None:
    """Remove directories to which a run that failed early wrote nothing."""
    for directory in directories:
        with suppress(OSError):  # it is not empty, or gone
            directory.rmdir()


def _check_free(logger: Any) -> None:
    if Path(logger.log_dir, CONFIG_NAME).exists():
        raise PaCAError(
            f"{type(logger).__name__}(version={logger.version!r}): {logger.log_dir!r} holds an earlier run, which "
            "would be overwritten. Give another version, or none for the next one."
        )


def _claim(logger: Any) -> Path:
    for _ in range(ATTEMPTS):
        next_version(logger)
        directory = Path(logger.log_dir)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another run was faster: the next number is free
            os.mkdir(directory)
            return directory
    raise PaCAError(f"{type(logger).__name__} finds no free version in {str(Path(logger.log_dir).parent)!r}.")
