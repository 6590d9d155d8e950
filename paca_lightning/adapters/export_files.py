"""The files of an exported adapter, which PEFT and servers read, and what adapters of all kinds have in common."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paca_lightning.adapters.exported import target_names, whole_modules
from paca_lightning.adapters.files import CONFIG, PREFIX, TENSORS, base_model_entries, write_json
from paca_lightning.conversion.inventory import Inventory
from paca_lightning.core.dtensor import is_first_rank, whole_tensor
from paca_lightning.core.files import written_aside
from paca_lightning.core.sealed_files import seal_weights
from paca_lightning.layers.base import PaCALayer


class Tokenizer(Protocol):
    """A tokenizer that can be saved beside a model."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Any:
        """Write the tokenizer to a directory."""


def common_rank(layers: Mapping[str, PaCALayer]) -> tuple[int, float]:
    """One rank and one scaling for all layers: the highest rank, and their scaling, or 1 if they have several."""
    scalings = {layer.scaling for layer in layers.values()}
    return max(layer.r for layer in layers.values()), scalings.pop() if len(scalings) == 1 else 1.0


def _tensors_of(whole: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Copies of the tensors of modules by their path, under PEFT's names: several names may be of one memory."""
    return {
        f"{PREFIX}{path}.{name}": whole_tensor(tensor).clone(memory_format=torch.contiguous_format)
        for path, module in whole.items()
        for name, tensor in module.state_dict().items()
    }


def write_adapter(
    directory: str | os.PathLike[str],
    inventory: Inventory,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """Write an adapter on the first rank, beside its place first. It is collective for a sharded model.

    Args:
        directory: Is created if it does not exist. Files of the same names are replaced.
        inventory: Of the model, for the base model, the targets, and the modules that the adapter holds whole.
        tensors: Of the layers, by PEFT's names.
        settings: What else ``adapter_config.json`` says.
        tokenizer: Is saved in the same directory.

    Raises:
        PaCAError: If PEFT could not hold a module whole.
    """
    base_entries = base_model_entries(inventory.base_model)
    whole = whole_modules(inventory, base_entries["task_type"])
    tensors = tensors | _tensors_of(whole)
    settings = {
        **base_entries,
        "target_modules": target_names(inventory),
        "modules_to_save": list(whole) or None,
        "inference_mode": True,
        **settings,
    }
    if not is_first_rank():
        return
    with written_aside(directory) as scratch:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        seal_weights(scratch)
        write_json(scratch / CONFIG, settings)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
