"""What ranks do together: raise the failure of one on all, so that none waits, and read the same files."""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.unchanged import Stamp, check_unchanged

T = TypeVar("T")


def raise_on_all_ranks(failure: PaCAError | None) -> None:
    """Raise the failure of any rank on all ranks. Collective.

    Raises:
        PaCAError: That of the first rank that has one.
    """
    if not dist.is_initialized():
        failures = [failure and str(failure)]
    else:
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure and str(failure))
    if first := next((message for message in failures if message), None):
        raise PaCAError(first) from failure


def on_all_ranks(work: Callable[[], T]) -> T:
    """What a function returns, if it succeeds on all ranks. Collective.

    Raises:
        PaCAError: On all ranks, if it does so on one.
    """
    failure: PaCAError | None = None
    try:
        result = work()
    except PaCAError as error:
        failure = error
    raise_on_all_ranks(failure)
    return result


def check_same_files(stamps: Mapping[Path, Stamp | None]) -> None:
    """Raise unless all ranks opened the same files. Collective.

    Hosts may have copies of their own: of those, names and sizes are compared.

    Args:
        stamps: Of the files that this rank opened.

    Raises:
        PaCAError: On all ranks, naming a file that was another one for some rank.
    """
    if not dist.is_initialized():
        return
    own = (socket.gethostname(), dict(stamps))
    ranks: list[tuple[str, dict[Path, Stamp | None]]] = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    first: dict[tuple[str, frozenset[int]], dict[Path, Stamp | None]] = {}
    for host, found in ranks:
        disks = frozenset(stamp.device for stamp in found.values() if stamp)
        check_unchanged(first.setdefault((host, disks), found), found)
    one, *others = [{path.name: stamp and stamp.size for path, stamp in found.items()} for found in first.values()]
    for copy in others:
        if differing := sorted(name for name in copy.keys() | one.keys() if copy.get(name) != one.get(name)):
            raise PaCAError(
                f"The hosts {', '.join(sorted({host for host, _ in first}))} have different files of the base model: "
                f"{differing[0]!r} differs in size ({len(differing)} of {len(copy)} do). Copy one model to all of them."
            )
