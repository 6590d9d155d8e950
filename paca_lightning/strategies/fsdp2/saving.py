"""Saving a checkpoint as a directory to which every rank writes its rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.restoring import METADATA


def save_directory(
    checkpoint: dict[str, Any], location: Location, *, is_first_rank: bool, barrier: Callable[[], None]
) -> None:
    """Write a sharded checkpoint. Collective: call it on every rank.

    A local directory is written beside its destination and renamed, so that an interruption leaves the old checkpoint.
    Elsewhere a rename would copy everything: there, the file without which nothing is restored is written last.

    Args:
        checkpoint: Lightning's. Its state dict and optimizer states are sharded.
        location: The directory. What is there is replaced.
        is_first_rank: Whether this rank writes what is not sharded.
        barrier: Waits for all ranks.
    """
    name = location.name.rpartition("/")[2]
    target = location.beside(f".{name}.partial") if location.is_local else location
    if is_first_rank:
        target.remove()
    barrier()
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    optimizers = {f"optimizer_{index}": state for index, state in enumerate(checkpoint.get("optimizer_states", []))}
    save({"state_dict": checkpoint["state_dict"], **optimizers}, checkpoint_id=target.name)
    if is_first_rank:
        with (target / METADATA).open("wb") as file:
            torch.save(rest, file)
        if target is not location:
            location.remove()
            Path(target.name).rename(location.name)
    barrier()
