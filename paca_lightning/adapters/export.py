"""Trained models for the world outside: a plain Hugging Face checkpoint, or an exact LoRA adapter for PEFT."""

import copy
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.state import config_of
from paca_lightning.core.dtensor import is_first_rank, whole_tensor
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import written_aside
from paca_lightning.core.paths import clean_path
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.linear4bit import from_linear4bit, linear4bit_class, linear4bit_obstacle
from paca_lightning.layers.nf4 import dequantize_rows
from paca_lightning.layers.nf4_linear import QPaCALinear

DTYPE = torch.bfloat16
SHARD_SIZE = "5GB"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Files of one checkpoint, of which another layout leaves some: from_pretrained would take the old ones."""


class Tokenizer(Protocol):
    """What can be saved beside a model."""

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Any:
        """Write itself to a directory."""


def export_merged(model: nn.Module, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write a converted model as a plain Hugging Face checkpoint in bf16, which any program loads without PaCA.

    NF4 bases are dequantized; the trained columns are exact up to bf16. The model itself stays as it is. Call it on
    every rank of a sharded model, of which the first writes; its host memory holds the bf16 model.

    Args:
        model: The converted Hugging Face model, or a module around it.
        directory: Is created; files of the same names in it are replaced, and the weights of an earlier model removed.
        tokenizer: Is saved beside it.

    Raises:
        PaCAError: If there is no Hugging Face model or no PaCA layer in it, a layer's own quantization is unknown, or
            the directory holds an adapter.
    """
    check_no_adapter(directory)
    base = _hugging_face_model(model)
    _layers(model)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(base)(config).to(DTYPE)
    plain.generation_config = base.generation_config
    state = _plain_state(base)
    if not is_first_rank():
        return
    with written_aside(directory, supersedes=WEIGHTS) as scratch:
        plain.save_pretrained(scratch, state_dict=state, max_shard_size=SHARD_SIZE)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


def export_lora(model: nn.Module, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write what a converted model learned as a LoRA adapter in PEFT's layout, of the same rank and without loss.

    A change of some columns, ``scaling * D``, is the product of ``B = D`` and an ``A`` whose rows pick the columns, so
    that servers which know only LoRA can run it. For an NF4 base it belongs on the full-precision model, whose columns
    the training started from.

    Args:
        model: The converted model, or a module around it.
        directory: Is created; files of the same names in it are replaced.
        tokenizer: Is saved beside it, where servers look for the chat template that an adapter was trained with.

    Raises:
        PaCAError: If the model has no PaCA layers.
    """
    layers = _layers(model)
    config = config_of(model)
    assert config is not None
    alphas = {layer.scaling * layer.r for layer in layers.values()}
    one_alpha = alphas.pop() if len(alphas) == 1 else None
    ranks = {path: layer.r for path, layer in layers.items() if layer.r != config.r}
    tensors = {}
    for path, layer in layers.items():
        # Where alphas differ, each is made equal to its rank and the scaling goes into B.
        factor = 1.0 if one_alpha is not None else layer.scaling
        selection = torch.zeros(layer.r, layer.in_features)
        selection[torch.arange(layer.r), layer.paca_indices.cpu()] = 1
        tensors[f"base_model.model.{path}.lora_A.weight"] = selection
        tensors[f"base_model.model.{path}.lora_B.weight"] = whole_tensor(layer.paca_delta).float() * factor
    for path, module in take_inventory(model).named_saved().items():
        for name, parameter in module.named_parameters():
            tensors[f"base_model.model.{path}.{name}"] = whole_tensor(parameter).contiguous()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(_unwrapped(model)).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(getattr(_unwrapped(model), "config", None), "_name_or_path", None) or None,
        "r": config.r,
        "lora_alpha": config.r if one_alpha is None else one_alpha,
        "rank_pattern": ranks,
        "alpha_pattern": ranks if one_alpha is None else {},
        "target_modules": list(layers),
        "modules_to_save": config.modules_to_save or None,
        "fan_in_fan_out": any(layer.paca_base_class.__name__ == "Conv1D" for layer in layers.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if not is_first_rank():
        return
    with written_aside(directory) as scratch:
        save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(settings, indent=2) + "\n"
        Path(scratch / "adapter_config.json").write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


def check_no_adapter(directory: str | os.PathLike[str]) -> None:
    """Raise if a directory for a merged model holds an adapter.

    Raises:
        PaCAError: Because from_pretrained would put the adapter on top of the merged model.
    """
    if Path(directory, "adapter_config.json").exists():
        raise PaCAError(
            f"{str(directory)!r} holds an adapter, which programs would put on top of a merged model in the same "
            "directory. Choose another directory."
        )


def _layers(model: nn.Module) -> dict[str, PaCALayer]:
    """PaCA layers by their path from the base model."""
    layers = take_inventory(model).named_layers()
    if not layers:
        raise PaCAError("The model has no PaCA layers, so there is nothing to export. Call apply_paca first.")
    return layers


def _unwrapped(model: nn.Module) -> nn.Module:
    """The outermost Hugging Face model in a module, or the module itself."""
    found = (m for m in model.modules() if hasattr(m, "get_output_embeddings") and hasattr(m, "config"))
    return next(found, model)


def _hugging_face_model(model: nn.Module) -> Any:
    base = _unwrapped(model)
    if not hasattr(base, "save_pretrained"):
        raise PaCAError(
            f"There is no Hugging Face model in {type(model).__name__}, so there is no such checkpoint to write. Use "
            "merge(model) and save its state_dict()."
        )
    return base


@torch.no_grad()
def _plain_state(base: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base model as if its layers were plain ones with the trained columns."""
    linear4bit = linear4bit_class()
    own = (PaCALayer,) if linear4bit is None else (PaCALayer, linear4bit)
    special = {clean_path(path): module for path, module in base.named_modules() if isinstance(module, own)}
    state = {}
    for name, tensor in base.state_dict().items():
        key = clean_path(name)
        if key.endswith(".bias") or not any(parent in special for parent in _parents(key)):
            state[key] = _narrow(whole_tensor(tensor))
    for path, module in special.items():
        state[f"{path}.weight"] = _narrow(_dense_weight(path, module))
    return state


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.to(DTYPE) if tensor.is_floating_point() else tensor


def _dense_weight(path: str, module: nn.Module) -> Tensor:
    """A layer's weight in the layout of its plain class, with the trained columns, gathered."""
    if isinstance(module, QPaCALinear):
        weight = _gathered(module.dequantize(DTYPE), module)
        return weight.t().contiguous() if module.paca_base_class.__name__ == "Conv1D" else weight
    if isinstance(module, PaCALayer):
        return whole_tensor(module.weight)
    if (obstacle := linear4bit_obstacle(module)) is not None:
        raise PaCAError(f"{path!r} cannot be exported: {obstacle}.")
    packed, scales, _ = from_linear4bit(module, path)
    return dequantize_rows(packed, scales, 2 * packed.shape[1], DTYPE).cpu()


def _gathered(rows: Tensor, layer: QPaCALinear) -> Tensor:
    """All rows of a weight, of which each rank has those of its shard of the packed one."""
    if not hasattr(layer.packed, "device_mesh"):
        return rows.cpu()
    from torch.distributed.tensor import DTensor

    packed: Any = layer.packed
    shape = (layer.out_features, layer.in_features)
    sharded = DTensor.from_local(
        rows, packed.device_mesh, packed.placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
    return sharded.full_tensor().cpu()
