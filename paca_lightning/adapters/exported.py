"""What an export is of: the model in question among several, and what the program that will load it refuses."""

import warnings
from typing import Any

import torch
from torch import nn

from paca_lightning.adapters.head import HEADS_BY_TASK
from paca_lightning.conversion.changed_state import changed_state
from paca_lightning.conversion.inventory import Inventory, take_inventory
from paca_lightning.core.dtensor import is_first_rank, local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import new_tokens_in
from paca_lightning.core.private.transformers import peft_takes_for_experts
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.layers.nf4 import dequantize_rows
from paca_lightning.layers.nf4_linear import QPaCALinear

MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
MAMBA_REFUSED = frozenset({"conv1d", "out_proj"})
"""Layers of Mamba models that PEFT refuses to adapt (0.21): fast kernels read their weights without calling them."""

MEASURED = 8
"""In how many layers the difference of an NF4 base is measured."""


def part_of(model: nn.Module, path: str | None) -> nn.Module:
    """The part of a module that is exported.

    Args:
        model: Any module.
        path: Of a module inside; None for all of it, which may then hold one Hugging Face model at most.

    Raises:
        PaCAError: If there is no such path, or no path and several Hugging Face models.
    """
    inventory = take_inventory(model)
    models = sorted(inventory.base_models)
    if path is not None:
        found = next((module for module, paths in inventory.paths.items() if path in paths), None)
        if found is None:
            raise PaCAError(f"path={path!r}: {type(model).__name__} has no such module. Hugging Face models: {models}.")
        return found
    if len(models) > 1:
        raise PaCAError(
            f"{type(model).__name__} holds {len(models)} Hugging Face models, {models}: say which one to export, such "
            f"as path={models[0]!r}."
        )
    return model


def hugging_face_model(model: nn.Module) -> Any:
    """The Hugging Face model in a module.

    Raises:
        PaCAError: If there is none.
    """
    base = take_inventory(model).base_model
    if base is None or not hasattr(base, "save_pretrained"):
        raise PaCAError(
            f"There is no Hugging Face model in {type(model).__name__}, so it cannot be written as a Hugging Face "
            "checkpoint. Use merge(model) and save its state_dict()."
        )
    return base


def named_paca_layers(model: nn.Module) -> dict[str, PaCALayer]:
    """PaCA layers by their path from the base model.

    Raises:
        PaCAError: If there is none.
    """
    layers = take_inventory(model).named_layers()
    if not layers:
        raise PaCAError("The model has no PaCA layers, so there is nothing to export. Call apply_paca first.")
    return layers


def named_dense_layers(inventory: Inventory) -> dict[str, PaCALayer]:
    """PaCA layers by their path from the base model, without stacked experts."""
    return {name: layer for name, layer in inventory.named_layers().items() if not isinstance(layer, PaCAExperts)}


def target_names(inventory: Inventory) -> list[str]:
    """The last segments of the layers' paths where they name these layers alone, or else the paths.

    PEFT takes both. Petals looks for last segments, and loads nothing, without an error, where it finds paths.
    """
    layers = named_dense_layers(inventory)
    segments = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    trained = set(inventory.layers.values())
    others = {
        path.rpartition(".")[2] for module, paths in inventory.paths.items() for path in paths if module not in trained
    }
    return list(layers) if segments.keys() & {path.rpartition(".")[2] for path in others} else list(segments)


def target_parameters(inventory: Inventory) -> list[str]:
    """The paths of stacked experts."""
    return [name for name, layer in inventory.named_layers().items() if isinstance(layer, PaCAExperts)]


def whole_modules(inventory: Inventory, task: str | None) -> dict[str, nn.Module]:
    """Modules that an adapter for PEFT holds whole, by each of their names.

    They are those trained whole, the head that PEFT expects for the task, and those that share a parameter with one of
    them: PEFT makes a copy of each that it is told of, and the others would keep the base weight.

    Raises:
        PaCAError: If columns of that head were trained, which PEFT cannot load beside a whole head, or PEFT would read
            a name as that of another module, too.
    """
    found = list(inventory.saved.values())
    for module, paths in inventory.paths.items():
        name = inventory.relative(paths[0])
        if name.rpartition(".")[2] not in HEADS_BY_TASK.get(task or "", set()) or module in found:
            continue
        if any(isinstance(part, PaCALayer) for part in module.modules()):
            raise PaCAError(
                f"PEFT loads {name!r} of a model for {task} as a whole, and some of its columns were trained. List it "
                "in modules_to_save instead, or use export_merged."
            )
        found.append(module)
    inside = {part for module in found for part in module.modules() if part is not module}
    outermost = [module for module in found if module not in inside]
    owners = {id(p): names for p, names in inventory.owners.items()}
    by_path = {path: module for module, paths in inventory.paths.items() for path in paths}
    tied = (name.rpartition(".")[0] for module in outermost for p in module.parameters() for name in owners[id(p)])
    outermost += [by_path[path] for path in dict.fromkeys(tied) if by_path[path] not in {*outermost, *inside}]
    result = {inventory.relative(path): module for module in outermost for path in inventory.paths[module]}
    for name, module in result.items():
        _check_name(name, module, inventory)
    return result


def _check_name(name: str, module: nn.Module, inventory: Inventory) -> None:
    """Refuse a module that PEFT cannot hold whole, or whose name it would find in another one's."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise PaCAError(f"PEFT refuses {name!r}, a {type(module).__name__}, in modules_to_save. Use export_merged.")
    for other, paths in inventory.paths.items():
        clash = next((path for path in map(inventory.relative, paths) if path.endswith(name)), None)
        if other is not module and clash is not None:
            raise PaCAError(
                f"PEFT takes every module whose path ends with {name!r} for that one, here also {clash!r} (0.21), so "
                "its adapters cannot hold it. Use export_merged."
            )


def check_adapter_can_hold(model: nn.Module, kind: str) -> None:
    """Refuse what an adapter for PEFT cannot hold, or what PEFT would not load.

    Args:
        model: The converted model, or a module around it.
        kind: Of the adapter: ``LoRA`` or ``PaCA``.

    Raises:
        PaCAError: If there is such a thing.
    """
    inventory = take_inventory(model)
    base = inventory.base_model
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    refused = [path for path in named_paca_layers(model) if path.rpartition(".")[2] in MAMBA_REFUSED]
    if kind == "LoRA" and model_type in MAMBA_TYPES and refused:
        raise PaCAError(
            f"PEFT refuses a LoRA adapter on {refused[0]!r} of a Mamba model ({len(refused)} such layers). Use "
            "export_merged, or train with exclude_modules=['out_proj']."
        )
    taken = peft_takes_for_experts(getattr(base, "config", None))
    mistaken = [path for path in named_dense_layers(inventory) if path.rpartition(".")[2] in taken]
    if mistaken:
        raise PaCAError(
            f"PEFT (0.21) takes {mistaken[0]!r} ({len(mistaken)} such layers) for a part of stacked experts, by its "
            f"name and the type of the model, so a {kind} adapter cannot hold it. Use export_merged."
        )
    outside = [path for path in (*inventory.layers, *inventory.saved) if not path.startswith(inventory.prefix)]
    if outside:
        raise PaCAError(
            f"A {kind} adapter of {type(base).__name__} cannot hold {outside[0]!r} ({len(outside)} such modules), "
            f"which is trained beside it. Use save_adapter, or path={inventory.base_path!r} for the model alone."
        )
    if (new := new_tokens_in(model)) is not None:
        raise PaCAError(
            f"A {kind} adapter cannot hold new tokens ({', '.join(map(repr, new.tokens))}): programs that load it "
            "would need a base model with room for them. Use export_merged."
        )
    if changed := sorted(changed_state(model)):
        raise PaCAError(
            f"A {kind} adapter cannot hold {changed[0]!r} ({len(changed)} such tensors), which changed beside the "
            "columns. Use export_merged, or train the module whole: modules_to_save."
        )


def check_quantized_base(layers: dict[str, PaCALayer]) -> None:
    """Warn that an exported adapter meets another base than an NF4 run was trained on, and by how much it differs.

    The difference is measured on the trained columns, of which both values are known, in some layers.
    """
    quantized = [layer for layer in layers.values() if isinstance(layer, QPaCALinear)]
    if not quantized or not is_first_rank():
        return
    errors, sizes = [], []
    for layer in quantized[:: -(-len(quantized) // MEASURED)]:
        exact = local(layer.paca_base_columns).float()
        scales = tuple(map(local, layer.scales))
        weight = dequantize_rows(local(layer.packed), scales, layer.in_features, torch.float32)
        errors.append(float((weight.index_select(1, layer.paca_indices) - exact).square().sum()))
        sizes.append(float(exact.square().sum()))
    error = (sum(errors) / sum(sizes)) ** 0.5
    which = (
        f"all but the trained columns differ from those in training by {error:.1%} (root mean square, measured on the "
        "trained columns)"
        if error
        else "all columns differ from those in training, about 9% (root mean square): the trained ones began quantized"
    )
    warnings.warn(
        f"{len(quantized)} layers were trained on an NF4 base, and the adapter is for the full-precision model: "
        f"there {which}, and outputs differ with them. export_merged writes the model that was trained.",
        stacklevel=3,
    )
