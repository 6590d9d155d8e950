"""What an export is of: the model in question among several, and what the program that will load it refuses."""

from typing import Any

from torch import nn

from paca_lightning.conversion.changed_state import changed_state
from paca_lightning.conversion.inventory import Inventory, take_inventory
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer

MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
MAMBA_REFUSED = frozenset({"conv1d", "out_proj"})
"""Layers of Mamba models that PEFT refuses to adapt (0.21): fast kernels read their weights without calling them."""

HEADS_BY_TASK = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}
"""Modules that PEFT looks for in an adapter of a task, trained or not."""


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


def whole_modules(inventory: Inventory, task: str | None) -> dict[str, nn.Module]:
    """Modules that a LoRA adapter holds whole: those trained whole, and the head that PEFT expects for the task.

    Raises:
        PaCAError: If columns of that head were trained, which PEFT cannot load beside a whole head.
    """
    found = inventory.named_saved()
    for module, paths in inventory.paths.items():
        name = inventory.relative(paths[0])
        if name.rpartition(".")[2] not in HEADS_BY_TASK.get(task or "", set()) or name in found:
            continue
        if any(isinstance(part, PaCALayer) for part in module.modules()):
            raise PaCAError(
                f"PEFT loads {name!r} of a model for {task} as a whole, and some of its columns were trained. List it "
                "in modules_to_save instead, or use export_merged."
            )
        found[name] = module
    return found


def check_lora_can_hold(model: nn.Module) -> None:
    """Refuse what a LoRA adapter cannot hold, or what PEFT would not load.

    Raises:
        PaCAError: If there is such a thing.
    """
    base = take_inventory(model).base_model
    kind = getattr(getattr(base, "config", None), "model_type", None)
    refused = [path for path in named_paca_layers(model) if path.rpartition(".")[2] in MAMBA_REFUSED]
    if kind in MAMBA_TYPES and refused:
        raise PaCAError(
            f"PEFT refuses a LoRA adapter on {refused[0]!r} of a Mamba model ({len(refused)} such layers). Use "
            "export_merged, or train with exclude_modules=['out_proj']."
        )
    if changed := sorted(changed_state(model)):
        raise PaCAError(
            f"A LoRA adapter cannot hold {changed[0]!r} ({len(changed)} such tensors), which changed beside the "
            "columns. Use export_merged, or train the module whole: modules_to_save."
        )
