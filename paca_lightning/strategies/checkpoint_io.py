"""LocalCheckpointIO: checkpoint files that are whole under their name, at every moment, and are read without trust."""

import shutil
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from paca_lightning.core.checkpoints import check_crc, read_safely
from paca_lightning.core.files import replacing


class LocalCheckpointIO(TorchCheckpointIO):
    """Lightning's, but local files are written beside their place, and renamed when they are on the disk.

    Lightning writes to the temporary directory. If that is another file system, the checkpoint is copied to its place
    piece by piece, and a kill or a full disk leaves half a file there.

    Files are read with ``weights_only=True`` unless the run says otherwise, URLs included, and local files are compared
    with their CRCs before.
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
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint from a local path or a URL.

        Raises:
            PaCAError: If it is damaged, or holds an object that could run code.
            FileNotFoundError: If there is none.
        """
        if "://" not in str(path) and Path(path).exists():
            check_crc(Path(path))
        if weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only)
        file_system, place = url_to_fs(str(path))
        with file_system.open(place, "rb") as file:
            return read_safely(file, str(path))

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
