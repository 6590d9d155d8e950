"""LocalCheckpointIO: checkpoint files that are whole under their name, at every moment."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from paca_lightning.core.files import replacing


class LocalCheckpointIO(TorchCheckpointIO):
    """Lightning's, but local files are written beside their place, and renamed when they are on the disk.

    Lightning writes to the temporary directory. If that is another file system, the checkpoint is copied to its place
    piece by piece, and a kill or a full disk leaves half a file there.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint to a local path or a URL.

        Raises:
            PaCAError: If the disk fails or is full. What was there is unchanged.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint. A directory loses its name first, so that no half of it is left under it."""
        place = Path(path)
        if "://" in str(path) or not place.is_dir() or place.is_symlink():
            super().remove_checkpoint(path)
            return
        removed = place.with_name(f".{place.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)  # of a process that was killed here
        place.rename(removed)
        shutil.rmtree(removed)
