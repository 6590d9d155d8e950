"""Saving a checkpoint as a directory to which every rank writes its rows."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from paca_lightning.core.checkpoints import METADATA
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import disk_error
from paca_lightning.core.sealed_files import shared_checksums, write_checksums
from paca_lightning.strategies.agreement import from_first_rank
from paca_lightning.strategies.fsdp2.location import Location

REPLACED = ".replaced"
"""End of a checkpoint's name while another one takes its place."""

UNCHANGED = "What was there before is unchanged. Mend the cause, or save elsewhere."

T = TypeVar("T")


def save_directory(checkpoint: dict[str, Any], location: Location) -> None:
    """Write a sharded checkpoint. Collective: call it on every rank.

    A local directory is written beside its destination and renamed. An old checkpoint is renamed before, and removed
    after that, so that one of the two is there at every moment (see :func:`restore_replaced`). Elsewhere a rename
    copies everything: there, only what takes the place of another checkpoint is written beside it, and the other one is
    removed when the new one is complete. The file without which nothing is restored is written last.

    Args:
        checkpoint: Lightning's. Its state dict and optimizer states are sharded.
        location: The directory. What is there is replaced.

    Raises:
        PaCAError: On all ranks, if one of them cannot write its part. What was there is as it was, unless the message
            says where the new checkpoint is.
    """
    target = replace(location, name=_on_first_rank(lambda: _empty_target(location).name, location))
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    optimizers = {f"optimizer_{index}": state for index, state in enumerate(checkpoint.get("optimizer_states", []))}
    try:
        save({"state_dict": checkpoint["state_dict"], **optimizers}, checkpoint_id=target.name)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise _not_written(location, rank, cause) from error
    names = _on_first_rank(lambda: _complete(target, rest), location)
    if location.is_local:
        sums = shared_checksums(Path(target.name), names)
        _on_first_rank(lambda: write_checksums(Path(target.name), sums), location)
    if target != location:
        # A failure in the last step leaves the new checkpoint, whatever is left of the old one.
        left = f"The new checkpoint is complete: at {target.name!r}, or in its place if it is not there."
        _on_first_rank(lambda: _take_the_place(target, location), location, left)


def _on_first_rank(work: Callable[[], T], location: Location, left: str = UNCHANGED) -> T:
    """What a part of saving returns that the first rank does alone. Collective.

    Args:
        work: Does it.
        location: Of the checkpoint.
        left: What a failure leaves, for the message.

    Raises:
        PaCAError: On all ranks, if it fails, for whatever cause.
    """

    def told() -> T:
        try:
            return work()
        except PaCAError:
            raise
        except Exception as error:  # of the disk, of a remote file system, or of what is pickled
            raise _not_written(location, 0, error, left) from error

    return from_first_rank(told)


def _not_written(location: Location, rank: int, cause: BaseException, left: str = UNCHANGED) -> PaCAError:
    return PaCAError(f"{location.name!r} could not be written by rank {rank}: {disk_error(cause) or cause}. {left}")


def _empty_target(location: Location) -> Location:
    """Where a checkpoint is to be written until it is complete. Nothing is there."""
    beside = location.is_local or location.exists()
    target = location.beside(f".{location.name.rpartition('/')[2]}.partial") if beside else location
    target.remove()
    return target


def _complete(target: Location, rest: dict[str, Any]) -> list[str]:
    """Write what is not sharded. Returns the names of all files of a local checkpoint.

    Other ranks get the names from the first one: their listings may come late.
    """
    with (target / METADATA).open("wb") as file:
        torch.save(rest, file)
    return sorted(path.name for path in Path(target.name).iterdir()) if target.is_local else []


def _take_the_place(new: Location, place: Location) -> None:
    """Move a directory to a name that another one, or a file, may have."""
    if not place.is_local:
        place.remove()
        new.move(place)
        return
    path = Path(place.name)
    old = _replaced(path)
    if path.exists():
        remove(old)
        path.rename(old)
    Path(new.name).rename(path)
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
