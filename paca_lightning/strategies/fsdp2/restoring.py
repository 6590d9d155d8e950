"""Restoring a sharded model and its optimizers from checkpoints that any number of ranks wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from paca_lightning.core.checkpoints import METADATA, check_crc, read_safely
from paca_lightning.core.dtensor import sharded_like
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.sealed_files import CHECKSUMS, check_checksums, read_checksums, shared_checksums
from paca_lightning.core.shard_lists import SHARDS, ShardList
from paca_lightning.strategies.fsdp2.agreeing import on_all_ranks
from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.shard_reader import PlainPlanner, ShardReader, shard_list_of
from paca_lightning.strategies.fsdp2.sharding import local_rows


def check_files(directory: Path) -> None:
    """Compare the files of a sharded checkpoint with their checksums, if it has some. Collective.

    Raises:
        PaCAError: On all ranks, naming the files that changed.
    """
    if (saved := read_checksums(directory)) is None:
        rank_zero_info(f"{directory} has no {CHECKSUMS}, as earlier versions wrote none: its bytes are not verified.")
        return
    if unlisted := {SHARDS, METADATA} - saved.keys():
        raise PaCAError(f"{directory / CHECKSUMS} is damaged: it has none of {min(unlisted)!r}. Use another copy.")
    check_checksums(directory, saved, shared_checksums(directory, saved))


def load_directory(
    location: Location, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool
) -> dict[str, Any]:
    """Restore from a directory to which the ranks wrote. Each rank reads its rows.

    Args:
        location: The directory.
        model: Sharded. The keys of its state dict are read.
        optimizers: The model's optimizers.
        strict: Whether missing and unexpected keys are errors.

    Returns:
        The rest of the checkpoint.

    Raises:
        PaCAError: If the checkpoint belongs to another model, or is damaged.
    """
    # Read into copies: a layer needs its old indices to restore the old columns before it takes new indices.
    listed = on_all_ranks(lambda: shard_list_of(location))
    state = {name: _copy(tensor) for name, tensor in get_model_state_dict(model).items()}
    _read({"state_dict": state}, location, listed)
    model.load_state_dict(state, strict=strict)
    for index, optimizer in enumerate(optimizers):
        optimizer_state = {f"optimizer_{index}": get_optimizer_state_dict(model, optimizer)}
        _read(optimizer_state, location, listed)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=optimizer_state[f"optimizer_{index}"])
    return _torch_load(location / METADATA)


def load_file(location: Location, model: nn.Module, optimizers: Sequence[Optimizer], *, strict: bool) -> dict[str, Any]:
    """Restore from one file, such as that of a run on one device. Each rank keeps its rows.

    Args:
        location: The file. Every rank must be able to read it.
        model: Sharded or not.
        optimizers: The model's optimizers, in the order in which they were saved.
        strict: Whether missing and unexpected keys are errors.

    Returns:
        The rest of the checkpoint.

    Raises:
        PaCAError: If the checkpoint belongs to another model, or is damaged.
    """
    checkpoint = _torch_load(location)
    named: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    state = {name: _sharded_as(tensor, named.get(name), name) for name, tensor in checkpoint.pop("state_dict").items()}
    model.load_state_dict(state, strict=strict)
    states = checkpoint.get("optimizer_states", [])
    if optimizers and len(states) != len(optimizers):
        raise PaCAError(
            f"{location.name!r} holds the states of {len(states)} optimizers and this run has {len(optimizers)}, so "
            "the run cannot resume from it. Files saved with save_weights_only hold none: resume from another one."
        )
    for optimizer, optimizer_state in zip(optimizers, states, strict=False):  # an evaluation has no optimizers
        if not optimizer_state["state"]:  # plain SGD has none; PyTorch (2.13) asserts that there is some
            optimizer.load_state_dict(optimizer_state)
            continue
        set_optimizer_state_dict(
            model,
            optimizer,
            optim_state_dict=_by_name(optimizer_state, model, optimizer),
            options=StateDictOptions(full_state_dict=True),
        )
    return checkpoint


def by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state as PyTorch saves it: with parameters numbered in the optimizer's order.

    Args:
        state: With parameters by name. Empty on all ranks but the first.
    """
    if not state:
        return {}
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: index for index, name in enumerate(names)}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [
            group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def _by_name(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The inverse of ``by_position``. The optimizer must have the same parameters in the same order."""
    saved = [number for group in state["param_groups"] for number in group["params"]]
    current: Mapping[str, Any] = get_optimizer_state_dict(model, optimizer)
    names = [name for group in current["param_groups"] for name in group["params"]]
    if len(saved) != len(names):
        raise PaCAError(
            f"The checkpoint's optimizer has {len(saved)} parameters and this run's has {len(names)}. Resume with the "
            "settings of the run that saved it."
        )
    name_of = dict(zip(saved, names, strict=True))
    return {
        "state": {name_of[number]: values for number, values in state["state"].items()},
        "param_groups": [
            group | {"params": [name_of[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _sharded_as(saved: Any, current: Tensor | None, name: str) -> Any:
    """A saved tensor, sharded like the model's tensor of that name."""
    if not isinstance(current, DTensor) or not isinstance(saved, Tensor):
        return saved
    if saved.shape != current.shape:
        raise PaCAError(
            f"{name!r} has shape {tuple(saved.shape)} in the checkpoint and {tuple(current.shape)} in the model. Use "
            "the rank and the base model of the run that saved it."
        )
    return sharded_like(saved[local_rows(current)].to(current.to_local().device), current, current.shape)


def _read(state: dict[str, Any], location: Location, listed: ShardList) -> None:
    try:
        load(state, storage_reader=ShardReader(location, listed), planner=PlainPlanner())
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise PaCAError(
            f"The checkpoint {location.name!r} does not fit this model and optimizer, or is damaged: "
            f"{_first_cause(error)}"
        ) from error


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause}"
    return str(error)


def _torch_load(location: Location) -> dict[str, Any]:
    if location.is_local:
        check_crc(Path(location.name))
        return read_safely(location.name, location.name)
    with location.open("rb") as file:
        return read_safely(file, location.name)
