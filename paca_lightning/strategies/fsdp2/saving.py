"""Saving a checkpoint as a directory to which every rank writes its rows."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from paca_lightning.core.checkpoints import METADATA
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import disk_error, told_if_the_disk_fails
from paca_lightning.core.sealed_files import shared_checksums, write_checksums
from paca_lightning.strategies.fsdp2.location import Location

REPLACED = ".replaced"
"""End of a checkpoint's name while another one takes its place."""


def save_directory(
    checkpoint: dict[str, Any], location: Location, *, is_first_rank: bool, barrier: Callable[[], None]
) -> None:
    """Write a sharded checkpoint. Collective: call it on every rank.

    A local directory is written beside its destination and renamed. An old checkpoint is renamed before, and removed
    after that, so that one of the two is there at every moment (see :func:`restore_replaced`). Elsewhere a rename would
    copy everything: there, the file without which nothing is restored is written last.

    Args:
        checkpoint: Lightning's. Its state dict and optimizer states are sharded.
        location: The directory. What is there is replaced.
        is_first_rank: Whether this rank writes what is not sharded.
        barrier: Waits for all ranks.

    Raises:
        PaCAError: On all ranks, if one of them cannot write its part.
    """
    name = location.name.rpartition("/")[2]
    target = location.beside(f".{name}.partial") if location.is_local else location
    if is_first_rank:
        target.remove()
    barrier()
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    optimizers = {f"optimizer_{index}": state for index, state in enumerate(checkpoint.get("optimizer_states", []))}
    try:
        save({"state_dict": checkpoint["state_dict"], **optimizers}, checkpoint_id=target.name)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = disk_error(cause) or str(cause)
        raise PaCAError(f"{location.name!r} could not be written by rank {rank}: {reason}. It is unchanged.") from error
    if is_first_rank:
        with told_if_the_disk_fails(location.name), (target / METADATA).open("wb") as file:
            torch.save(rest, file)
    if target is not location:
        _seal(Path(target.name), is_first_rank=is_first_rank)
        if is_first_rank:
            _take_the_place(Path(target.name), Path(location.name))
    barrier()


def _seal(directory: Path, *, is_first_rank: bool) -> None:
    """Write the checksums of all files. The first rank says which there are: listings of others may come late."""
    names = [sorted(path.name for path in directory.iterdir()) if is_first_rank else []]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    sums = shared_checksums(directory, names[0])
    if is_first_rank:
        with told_if_the_disk_fails(directory):
            write_checksums(directory, sums)


def _take_the_place(new: Path, place: Path) -> None:
    """Rename a directory to a name that another one, or a file, may have."""
    old = _replaced(place)
    if place.exists():
        remove(old)
        place.rename(old)
    new.rename(place)
    remove(old)


def restore_replaced(place: Path) -> None:
    """Give a checkpoint its name back, if a process was killed when it had renamed it and had not yet put the new one.

    Args:
        place: Where a checkpoint should be.
    """
    if not place.exists() and _replaced(place).exists():
        with suppress(FileNotFoundError):  # another rank was faster
            _replaced(place).rename(place)


def replaced_checkpoints(directory: Path) -> Iterator[Path]:
    """Places in a directory whose checkpoint has another name at the moment."""
    for found in directory.glob(f".*{REPLACED}"):
        yield found.with_name(found.name.removeprefix(".").removesuffix(REPLACED))


def _replaced(place: Path) -> Path:
    return place.with_name(f".{place.name}{REPLACED}")


def remove(path: Path) -> None:
    """Remove a file or a directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
