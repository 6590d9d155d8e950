"""Adapter directories: indices and deltas in PEFT's PaCA layout, as safetensors and JSON."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paca_lightning.adapters.absolute import updates_of
from paca_lightning.adapters.files import (
    CONFIG,
    PREFIX,
    SETTINGS,
    TENSORS,
    peft_config,
    sealed,
    write_json,
)
from paca_lightning.adapters.fingerprint import sample_columns
from paca_lightning.adapters.fitting import check_base_model, check_layers, whole_targets
from paca_lightning.adapters.head import check_labels, take_labels
from paca_lightning.adapters.new_tokens import check_can_wait, keep_room, room_for
from paca_lightning.adapters.saved import SavedAdapter, read_adapter
from paca_lightning.adapters.settings import settings_of
from paca_lightning.adapters.tensors import implausible
from paca_lightning.adapters.update import in_own_steps, whole_update
from paca_lightning.conversion.changed_state import changed_state, overwrite, remember_thawed
from paca_lightning.conversion.convert import convert
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.named_adapters import adding_adapter, hold_quantized_base
from paca_lightning.conversion.report import ConversionReport, layer_records
from paca_lightning.conversion.revert import undone_on_error
from paca_lightning.conversion.select import check_quantizable, quantize_layers
from paca_lightning.conversion.state import config_of
from paca_lightning.core.checksums import tensor_checksum
from paca_lightning.core.dtensor import copy_into, is_first_rank, whole_tensor
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import written_aside
from paca_lightning.layers.experts import ExpertWeight
from paca_lightning.layers.rows import write_all_rows

log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a converted model's indices and deltas to a directory, and what else was trained.

    That is modules trained whole, parameters that were thawed, and buffers that moved, such as running statistics.

    A sharded model is gathered layer by layer: call it on every rank, of which the first writes.

    Args:
        model: The converted model, or a module around it.
        directory: Is created; files of the same names in it are replaced.

    Raises:
        PaCAError: If the model has no PaCA layers, or parts with different configurations, or training diverged and
            left NaN or Inf in it. An adapter that was there is kept.
    """
    write = gather_adapter(model)
    if is_first_rank():
        write(directory)


def gather_adapter(model: nn.Module) -> Callable[[str | os.PathLike[str]], None]:
    """Gather what :func:`save_adapter` writes. Collective for a sharded model: call it on every rank.

    Args:
        model: The converted model, or a module around it.

    Returns:
        Writes the adapter to a directory, on one rank alone.

    Raises:
        PaCAError: As :func:`save_adapter`, on all ranks.
    """
    config = config_of(model)
    inventory = take_inventory(model)
    layers = inventory.named_layers()
    if not layers or config is None:
        raise PaCAError("The model has no PaCA layers, so there is no adapter to save. Call apply_paca first.")
    tensors: dict[str, Tensor] = {}  # by name from the base model
    samples: dict[str, list[float]] = {}
    for path, layer in layers.items():
        tensors[f"{path}.paca_delta"] = whole_update(layer)
        tensors[f"{path}.paca_indices"] = whole_tensor(layer.paca_indices)
        samples[path] = sample_columns(whole_tensor(layer.paca_base_columns))
    for path, module in inventory.named_saved().items():
        for name, tensor in module.state_dict().items():
            tensors[f"{path}.{name}"] = whole_tensor(tensor)
    changed = {inventory.relative(name): tensor for name, (tensor, _) in changed_state(model).items()}
    tensors |= {name: whole_tensor(tensor) for name, tensor in changed.items()}
    if (problem := implausible(tensors)) is not None:
        raise PaCAError(
            f"{problem}: training diverged, so there is no adapter to save. Lower the learning rate, or begin from a "
            "base model that is sound."
        )

    def write(directory: str | os.PathLike[str]) -> None:
        with written_aside(directory) as scratch:
            copies, checksums = _copies(tensors)
            save_file(copies, scratch / TENSORS, metadata={"format": "pt"})
            write_json(scratch / CONFIG, peft_config(inventory.base_model, config))
            ours = settings_of(inventory, config, changed, samples) | {"checksums": checksums}
            write_json(scratch / SETTINGS, sealed(ours))

    return write


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str | None = None) -> ConversionReport:
    """Convert a fresh base model as an adapter says, or take a converted one, and load the adapter into it.

    A base model that has no room for the new tokens of an adapter gets it; ``unload`` takes it back.

    With a name, the adapter comes beside those that the model has, and is the active one: see ``set_adapter``. What was
    trained or loaded without a name before is called ``"default"`` from then on.

    Args:
        model: The base model the adapter was trained on, or a module around it.
        directory: What ``save_adapter`` wrote, an adapter of PEFT's own PaCA (0.22) or of the fork by PaCA's authors,
            or a Lightning checkpoint of a run with PaCAStrategy: a ``.ckpt`` file, or the directory of a sharded one.
        name: Of one of several adapters. Its rank, columns and targets need not be those of others. None: the adapter
            takes the place of the active one, whose settings must be the same.

    Returns:
        The report of the conversion.

    Raises:
        PaCAError: If a file is missing or damaged, a tensor does not fit (naming the layer), or the base model is
            another one; if the name is taken, or several adapters cannot have this base. The model is then as
            it was, bitwise: everything is checked before anything is changed. One exception: a fresh model that
            bitsandbytes had quantized is dequantized, or with a name holds the same bits in layers of ours.
    """
    adapter = read_adapter(directory)
    with _directory_in_errors(directory), room_for(model, adapter.new_tokens) as room:
        if name is None:
            report = load_saved(model, adapter)
            keep_room(model, room)
        else:
            check_can_wait(model)
            hold_quantized_base(model, adapter.config)
            with adding_adapter(model, name):
                report = load_saved(model, adapter, alone=False)
    if not adapter.verified and is_first_rank():
        log.warning("%s: the adapter has no checksums, so whether its bytes are as saved was not verified.", directory)
    if adapter.settings is not None and adapter.settings.fingerprint is None and is_first_rank():
        log.warning(
            "%s: an earlier version saved this checkpoint of sharded ranks without values of its base model, so "
            "whether this is the model it was trained on was not verified.",
            directory,
        )
    return report


def load_saved(model: nn.Module, adapter: SavedAdapter, *, alone: bool = True) -> ConversionReport:
    """Convert a fresh base model as an adapter says, or take a converted one, and load the adapter into it.

    Args:
        model: The model.
        adapter: The adapter.
        alone: Whether no other adapter comes beside it. Then the model is quantized if its settings say so, which
            cannot be undone, and takes the names of its labels if it has none of its own.

    Raises:
        PaCAError: If it does not fit, or its labels are not those of the model. The model is then as it was.
    """
    tensors, settings = adapter.tensors, adapter.settings
    inventory = take_inventory(model)
    with undone_on_error(inventory):
        known = config_of(model)
        config = known or adapter.config
        # Whatever the selection, the columns are the adapter's: no data needs to follow.
        given = tensors.indices if known is None else None
        # Adapters of other programs, and of our version 0.1.0, leave stacked experts alone where all-linear has them.
        stacked = {inventory.relative(paths[0]) for m, paths in inventory.paths.items() if isinstance(m, ExpertWeight)}
        left = {*adapter.left, *(stacked - tensors.deltas.keys())}
        report = convert(inventory, config, given, data_follows=True, left=left, quantize=False)
        layers = inventory.named_layers()
        check_layers(layers, tensors, settings)
        targets = whole_targets(inventory, tensors.whole, settings)
        check_base_model(layers, adapter)
        if alone:
            check_labels(inventory.base_model, adapter.head)
        deltas = updates_of(layers, tensors) if tensors.absolute else tensors.deltas
        check_quantizable(layers, config)
    with torch.no_grad():
        for path, layer in layers.items():
            layer.move_to_columns(tensors.indices[path].to(layer.paca_indices.device))
            layer.paca_pending = None
            copy_into(layer.paca_delta, in_own_steps(deltas[path], layer))
            layer.write_columns()
        for tensor, original in changed_state(model).values():  # what an adapter does not hold is as in the base model
            overwrite(tensor, original)
        remember_thawed(model, {id(tensor) for tensor, _ in targets.values()})
        for tensor, value in targets.values():
            copy_into(tensor, value)
        write_all_rows(model)
    if alone:
        quantize_layers(layers, config)
        take_labels(inventory.base_model, adapter.head)
    report.layers = layer_records(inventory)
    return report


@contextmanager
def _directory_in_errors(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Begin the message of an error with the adapter's directory."""
    try:
        yield
    except PaCAError as error:
        raise PaCAError(f"{directory}: {error}") from error


def _copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies under PEFT's names, as safetensors writes no two names of one memory, and the checksum of each tensor."""
    copies, checksums = {}, {}
    for name, tensor in tensors.items():
        copies[f"{PREFIX}{name}"] = copy = tensor.contiguous().clone()
        checksums[name] = tensor_checksum(copy)  # while it is in the core's cache
    return copies, checksums
