"""The directory of a run's files."""

from pathlib import Path

from lightning.pytorch import Trainer

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable


def run_directory(trainer: Trainer) -> Path:
    """Create and return the run's directory: the logger's, or the trainer's ``default_root_dir`` without a logger.

    Must be called on all processes, as loggers broadcast their version.

    Raises:
        PaCAError: If the directory cannot be created or written.
    """
    directory = Path(trainer.log_dir or trainer.default_root_dir)
    check_writable(directory, "The run's directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PaCAError(f"The run's directory {str(directory)!r} cannot be created: {error}.") from error
    return directory
