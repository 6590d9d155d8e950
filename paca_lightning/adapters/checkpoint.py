"""Adapters in Lightning checkpoints: what a checkpoint notes of its adapter, and how that is read without a run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.adapters.files import CONFIG, base_model_entries
from paca_lightning.adapters.fingerprint import base_samples
from paca_lightning.adapters.settings import AdapterSettings, parse_settings, settings_of
from paca_lightning.adapters.tensors import AdapterTensors, checked_tensors
from paca_lightning.conversion.changed_state import changed_state
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.state import config_of
from paca_lightning.core.checkpoints import (
    METADATA,
    check_crc,
    is_checkpoint_directory,
    is_plain,
    read_safely,
)
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path
from paca_lightning.core.sharded_checkpoints import ShardedTensor, sharded_tensors

NOTE = "paca_adapter"
"""Key of a checkpoint: what its state dict does not tell of the adapter in it."""


@dataclass(frozen=True)
class AdapterNote:
    """What a checkpoint notes of its adapter.

    Attributes:
        settings: What an adapter tells beside its tensors.
        prefix: What names in the state dict begin with, inside the base model.
        saved: Paths of modules trained whole.
        stepped: Paths of layers whose columns have steps of their own.
        base_model: Directory or hub id of the base model, if it is known.
    """

    settings: AdapterSettings
    prefix: str
    saved: list[str]
    stepped: list[str]
    base_model: str | None


def note_adapter(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put into a checkpoint, as plain values, what its state dict does not tell of the adapter in it; once."""
    config = config_of(module)
    if config is None or NOTE in checkpoint:
        return
    inventory = take_inventory(module)
    changed = [inventory.relative(name) for name in changed_state(module)]
    checkpoint[NOTE] = {
        **settings_of(inventory, config, changed, base_samples(module)),
        "prefix": inventory.prefix,
        "saved": list(inventory.named_saved()),
        "stepped": [path for path, layer in inventory.named_layers().items() if layer.paca_scale is not None],
        "base_model": base_model_entries(inventory.base_model)["base_model_name_or_path"],
    }


def read_note(path: Path) -> AdapterNote:
    """What a checkpoint notes of its adapter.

    Raises:
        PaCAError: If the checkpoint is damaged, has no adapter, or notes nothing of it.
    """
    return _note_in(_read(path), path)


def read_checkpoint(path: Path) -> tuple[AdapterNote, AdapterTensors]:
    """The adapter in a checkpoint, each tensor checked by itself.

    Args:
        path: A file, or a directory to which several ranks wrote.

    Raises:
        PaCAError: If the checkpoint is damaged, has no adapter, or does not tell how it was made.
    """
    content = _read(path, verify=True)
    note = _note_in(content, path)
    tensors = dict(_of_adapter(content["state_dict"], note, path))
    return note, checked_tensors(_in_units_of_scaling(tensors, note, path), path)


def _read(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """What a checkpoint holds. The tensors of a sharded one are still to be read."""
    sharded = is_checkpoint_directory(path)
    file = path / METADATA if sharded else path
    if not file.is_file():
        raise PaCAError(f"There is no checkpoint {str(path)!r} (looked for {path.absolute()}).")
    if verify:
        check_crc(file)
    content = read_safely(file, str(file))
    if sharded:
        content["state_dict"] = sharded_tensors(path)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise PaCAError(f"{path} is no Lightning checkpoint: it has no state_dict. Of an adapter, give the directory.")
    return content


def _note_in(content: dict[str, Any], path: Path) -> AdapterNote:
    if NOTE in content:
        return _parse(content[NOTE], path)
    if not any(name.endswith(".paca_delta") for name in content["state_dict"]):
        raise PaCAError(f"{path} has no PaCA adapter: no layer in it was trained by PaCAStrategy.")
    beside = path.absolute().parent.parent / "adapter"
    raise PaCAError(
        f"{path} does not tell how its adapter was made: an earlier version saved it, or save_checkpoint with "
        "weights_only=True after the run. Its run's config writes the adapter, with an AdapterCheckpoint: "
        f"paca-lightning fit --config ... --ckpt_path {path} --trainer.limit_train_batches=0"
        + (f" (the last one of that run may be {str(beside)!r})" if (beside / CONFIG).is_file() else "")
    )


def _parse(note: Any, path: Path) -> AdapterNote:
    if not isinstance(note, dict) or not all(isinstance(note.get(name), list) for name in ("saved", "stepped")):
        raise PaCAError(f"{path}: {NOTE!r} is damaged. Take another checkpoint.")
    settings = parse_settings(note | {"fingerprint": note.get("fingerprint") or {}}, f"{path}: {NOTE!r}")
    if note.get("fingerprint") is None:
        settings = replace(settings, fingerprint=None)
    return AdapterNote(
        settings,
        prefix=str(note.get("prefix")),
        saved=[str(path) for path in note["saved"]],
        stepped=[str(path) for path in note["stepped"]],
        base_model=note.get("base_model"),
    )


def _of_adapter(state: Mapping[str, Any], note: AdapterNote, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and copies of an adapter's tensors in a state dict, with the steps of its columns."""
    inside, changed = tuple(f"{saved}." for saved in note.saved), set(note.settings.changed)
    for key, tensor in state.items():
        name = clean_path(key).removeprefix(note.prefix)
        if name.endswith((".paca_delta", ".paca_indices", ".paca_scale")) or name in changed or name.startswith(inside):
            if isinstance(tensor, ShardedTensor):
                yield name, tensor.read()
            elif is_plain(tensor):
                yield name, tensor.detach().clone(memory_format=torch.contiguous_format)
            else:
                raise PaCAError(f"{path}: {name!r} is no plain tensor. It is damaged.")


def _in_units_of_scaling(tensors: dict[str, Tensor], note: AdapterNote, path: Path) -> dict[str, Tensor]:
    """The tensors as adapters hold them: deltas times their columns' steps, which are powers of two."""
    for layer in note.stepped:
        delta, steps = tensors.get(f"{layer}.paca_delta"), tensors.pop(f"{layer}.paca_scale", None)
        if delta is None or steps is None or steps.dim() != 1 or delta.shape[-1:] != steps.shape:
            raise PaCAError(f"{path}: the steps of {layer!r} are not there or do not fit its delta. It is damaged.")
        tensors[f"{layer}.paca_delta"] = delta * steps
    return tensors
