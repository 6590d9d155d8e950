"""Adapter directories: indices and deltas in PEFT's PaCA layout, as safetensors and JSON."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paca_lightning.adapters.files import (
    CONFIG,
    PREFIX,
    SETTINGS,
    TENSORS,
    AdapterSettings,
    adapter_config,
    not_finite,
    peft_config,
    read_json,
    read_settings,
    read_tensors,
    write_json,
)
from paca_lightning.adapters.fingerprint import QUANTIZED_TOLERANCE, TOLERANCE, differing_layer, sample_columns
from paca_lightning.conversion.changed_state import changed_state, remember_thawed
from paca_lightning.conversion.convert import convert
from paca_lightning.conversion.inventory import Inventory, take_inventory
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.conversion.revert import undone_on_error
from paca_lightning.conversion.select import quantize_layers
from paca_lightning.conversion.state import config_of, layers_left
from paca_lightning.core.dtensor import copy_into, is_first_rank, whole_tensor
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import written_aside
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import check_indices


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
    config = config_of(model)
    inventory = take_inventory(model)
    layers = inventory.named_layers()
    if not layers or config is None:
        raise PaCAError("The model has no PaCA layers, so there is no adapter to save. Call apply_paca first.")
    tensors: dict[str, Tensor] = {}
    samples: dict[str, list[float]] = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.paca_delta"] = whole_tensor(layer.paca_delta)
        tensors[f"{PREFIX}{path}.paca_indices"] = whole_tensor(layer.paca_indices)
        samples[path] = sample_columns(whole_tensor(layer.paca_base_columns))
    for path, module in inventory.named_saved().items():
        for name, tensor in module.state_dict().items():
            tensors[f"{PREFIX}{path}.{name}"] = whole_tensor(tensor)
    changed = {inventory.relative(name): tensor for name, (tensor, _) in changed_state(model).items()}
    tensors |= {f"{PREFIX}{name}": whole_tensor(tensor) for name, tensor in changed.items()}
    if (broken := not_finite(tensors)) is not None:
        raise PaCAError(
            f"{broken!r} has NaN or Inf: training diverged, so there is no adapter to save. Lower the learning rate, "
            "or begin from a base model that is sound."
        )
    if not is_first_rank():
        return
    with written_aside(directory) as scratch:
        save_file(_copies(tensors), scratch / TENSORS, metadata={"format": "pt"})
        write_json(scratch / CONFIG, peft_config(inventory.base_model, config))
        ranks = {path: {"r": layer.r, "alpha": layer.scaling * layer.r} for path, layer in layers.items()}
        ours = {"version": version("paca-lightning"), "config": config.to_dict(), "layers": ranks}
        ours |= {"left": layers_left(inventory), "changed": list(changed), "fingerprint": samples}
        write_json(scratch / SETTINGS, ours)


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> ConversionReport:
    """Convert a fresh base model as an adapter says, or take a converted one, and load the adapter into it.

    Args:
        model: The base model the adapter was trained on, or a module around it.
        directory: What ``save_adapter`` wrote, or PEFT's own PaCA adapter.

    Returns:
        The report of the conversion.

    Raises:
        PaCAError: If a file is missing or damaged, a tensor does not fit (naming the layer), or the base model is
            another one. The model is then as it was, unless it was quantized on the way: that cannot be undone.
    """
    config, settings = adapter_config(directory), read_settings(Path(directory))
    indices, deltas, whole = read_tensors(Path(directory))
    inventory = take_inventory(model)
    with _directory_in_errors(directory), undone_on_error(inventory):
        known = config_of(model)
        # Whatever the selection, the columns are the adapter's: no data needs to follow.
        left = () if settings is None else settings.left
        report = convert(inventory, known or config, indices if known is None else None, data_follows=True, left=left)
        layers = inventory.named_layers()
        before = {path: layer.paca_indices.clone() for path, layer in layers.items()}
        _check_layers(layers, indices, deltas, settings)
        targets = _whole_targets(inventory, whole, settings)
        try:
            for path, layer in layers.items():
                layer.move_to_columns(indices[path].to(layer.paca_indices.device))
            _check_base_model(layers, settings, directory, QUANTIZED_TOLERANCE if config.quantize else TOLERANCE)
        except PaCAError:
            for path, layer in layers.items():
                layer.move_to_columns(before[path])
            raise
    with torch.no_grad():
        for path, layer in layers.items():
            layer.paca_pending = None
            copy_into(layer.paca_delta, deltas[path])
            layer.write_columns()
        remember_thawed(model, {id(tensor) for tensor, _ in targets.values()})
        for tensor, value in targets.values():
            copy_into(tensor, value)
    quantize_layers(layers, known or config)  # those that waited for data to choose their columns
    return report


@contextmanager
def _directory_in_errors(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Begin the message of an error with the adapter's directory."""
    try:
        yield
    except PaCAError as error:
        raise PaCAError(f"{directory}: {error}") from error


def _check_layers(
    layers: dict[str, PaCALayer],
    indices: dict[str, Tensor],
    deltas: dict[str, Tensor],
    settings: AdapterSettings | None,
) -> None:
    for path in sorted(layers.keys() ^ deltas.keys()):
        where = "in the adapter but not a PaCA layer of the model" if path in deltas else "not in the adapter"
        raise PaCAError(f"{path!r} is {where}. Use the settings and the base model it was trained with.")
    for path in deltas:
        if settings is not None and not (path in settings.scalings and path in settings.fingerprint):
            raise PaCAError(f"{SETTINGS} and {TENSORS} disagree about {path!r}: the adapter is damaged. Save it again.")
    for path, layer in layers.items():
        if layer.r != len(indices[path]) == deltas[path].shape[-1]:
            raise PaCAError(
                f"{path!r} was trained with r={len(indices[path])}, the model has r={layer.r}. Use the adapter's "
                "settings (PaCAStrategy(adapter=...) takes them), or unload(model) first."
            )
        expected = (layer.out_features, layer.r)
        if tuple(deltas[path].shape) != expected:
            raise PaCAError(
                f"the delta of {path!r} has shape {tuple(deltas[path].shape)}, the model needs {expected}. Use the "
                "settings and the base model it was trained with."
            )
        check_indices(indices[path], layer.in_features, layer.r, path=path)
        if settings is not None and settings.scalings[path] != layer.scaling:
            raise PaCAError(
                f"{path!r} was trained with scaling {settings.scalings[path]:g}, the model has {layer.scaling:g}. Use "
                "the adapter's alpha."
            )


def _check_base_model(
    layers: dict[str, PaCALayer], settings: AdapterSettings | None, directory: str | os.PathLike[str], tolerance: float
) -> None:
    if settings is None:
        return
    here = {path: sample_columns(whole_tensor(layer.paca_base_columns)) for path, layer in layers.items()}
    if (path := differing_layer(settings.fingerprint, here, tolerance)) is not None:
        name = read_json(Path(directory) / CONFIG).get("base_model_name_or_path")
        raise PaCAError(
            f"it was trained on another base model: its weights differ from those here, most in {path!r}. Load the one "
            f"it was trained on{f', {name!r}' if name else ''}."
        )


def _whole_targets(
    inventory: Inventory, whole: dict[str, Tensor], settings: AdapterSettings | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of the model that an adapter holds beside the deltas, and their values, by name from the base model.

    They are those of modules trained whole, and what else had changed when the adapter was saved.
    """
    here = {
        f"{path}.{name}": tensor
        for path, module in inventory.named_saved().items()
        for name, tensor in module.state_dict().items()
    }
    changed = () if settings is None else settings.changed
    present = {inventory.relative(name): t for name, t in (inventory.parameters | inventory.buffers).items()}
    here |= {name: present[name] for name in changed if name in present}
    for name in sorted(here.keys() ^ whole.keys()):
        where = "not in the adapter" if name in here else "in the adapter but not in modules_to_save"
        raise PaCAError(f"{name!r} is {where}. Use the modules_to_save it was trained with.")
    for name, value in whole.items():
        if value.shape != here[name].shape:
            raise PaCAError(
                f"{name!r} has shape {tuple(value.shape)}, the model needs {tuple(here[name].shape)}. Use the base "
                "model it was trained with."
            )
    return {name: (here[name], value) for name, value in whole.items()}


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, as safetensors writes no two names of one memory."""
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
