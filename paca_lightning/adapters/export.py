"""Exports of a trained model for other programs: a plain Hugging Face checkpoint, or an exact LoRA adapter."""

import copy
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from paca_lightning.adapters.export_files import Tokenizer, common_rank, write_adapter
from paca_lightning.adapters.exported import (
    check_adapter_can_hold,
    check_quantized_base,
    hugging_face_model,
    named_paca_layers,
    part_of,
    target_parameters,
)
from paca_lightning.adapters.files import PREFIX
from paca_lightning.adapters.lora_factors import lora_factors, lora_name
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.core.dtensor import is_first_rank, sharded_like, whole_tensor
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import written_aside
from paca_lightning.core.new_tokens import ROWS
from paca_lightning.core.paths import clean_path
from paca_lightning.core.sealed_files import seal_weights
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.layers.linear4bit import from_linear4bit, linear4bit_class, linear4bit_obstacle
from paca_lightning.layers.nf4 import dequantize_rows
from paca_lightning.layers.nf4_linear import QPaCALinear
from paca_lightning.layers.nf4_plain import NF4Linear

DTYPE = torch.bfloat16
SHARD_SIZE = "5GB"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Names of weight files. Those of an earlier export are removed: from_pretrained would mix them with the new ones."""


def export_merged(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    path: str | None = None,
) -> None:
    """Write a converted model as a plain Hugging Face checkpoint in bf16, which needs no PaCA to be loaded.

    NF4 bases are dequantized; the trained columns are exact up to bf16. The model itself does not change.

    For a sharded model the call is collective: make it on every rank. Tensors are gathered one at a time. The first
    rank keeps the bf16 model in host memory and writes it; the others keep nothing.

    Args:
        model: The converted Hugging Face model, or a module around it.
        directory: Is created if it does not exist. Files of the same names and the weights of an earlier export are
            replaced; other files stay.
        tokenizer: Is saved in the same directory.
        path: Of the Hugging Face model to write, in a module that holds several, such as a teacher and a student.

    Raises:
        PaCAError: If the model contains no Hugging Face model, several and no path, or no PaCA layer, if bitsandbytes
            quantized a layer in a way that is not supported, or if the directory holds an adapter.
    """
    check_no_adapter(directory)
    base = hugging_face_model(part_of(model, path))
    named_paca_layers(base)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(base)(config).to(DTYPE)
    if (generation_config := getattr(base, "generation_config", None)) is not None:  # an encoder has none
        plain.generation_config = generation_config
    tensors = _plain_tensors(base)
    if not is_first_rank():
        for _ in tensors:  # takes part in gathering
            pass
        return
    state = dict(tensors)
    with written_aside(directory, supersedes=WEIGHTS) as scratch:
        plain.save_pretrained(scratch, state_dict=state, max_shard_size=SHARD_SIZE)
        seal_weights(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    path: str | None = None,
) -> None:
    """Write the training result as a LoRA adapter in PEFT's layout, without loss, of the highest rank of a layer.

    The change of the selected columns, ``scaling * D``, is the product ``B A`` of ``B = D`` and a matrix ``A`` whose
    rows select the columns. Servers that only know LoRA can run it. Layers of a lower rank than others are filled up
    with zeros, so that all have one rank. Stacked experts are what PEFT calls ``target_parameters``: each expert has
    factors of its own. The adapter of an NF4 base belongs on the full-precision model, from whose columns the training
    started; a warning says by how much the two bases differ. Modules trained whole are written whole, and with them
    those that share a weight, such as tied embeddings.

    For a sharded model the call is collective: make it on every rank. The first rank writes.

    Args:
        model: The converted model, or a module around it.
        directory: Is created if it does not exist. Files of the same names are replaced.
        tokenizer: Is saved in the same directory, where servers look for an adapter's chat template.
        path: Of the model whose adapter to write, in a module that holds several Hugging Face models.

    Raises:
        PaCAError: If the model has no PaCA layers, several Hugging Face models and no path, or trained what a LoRA
            adapter cannot hold, or what PEFT refuses or would read as something else.
    """
    model = part_of(model, path)
    check_adapter_can_hold(model, "LoRA")
    inventory = take_inventory(model)
    layers = inventory.named_layers()
    check_quantized_base(layers)
    rank, scaling = common_rank(layers)  # vLLM and llama.cpp do not read PEFT's rank_pattern and alpha_pattern
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        prefix = PREFIX + lora_name(name, layer)
        tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"] = lora_factors(layer, rank, scaling)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank * scaling,
        **({"target_parameters": experts} if (experts := target_parameters(inventory)) else {}),
        "fan_in_fan_out": any(layer.paca_base_class.__name__ == "Conv1D" for layer in layers.values()),
        "lora_dropout": 0.0,
        "init_lora_weights": True,  # Petals asks for it
        "bias": "none",
    }
    write_adapter(directory, inventory, tensors, settings, tokenizer)


def check_no_adapter(directory: str | os.PathLike[str]) -> None:
    """Refuse a directory for a merged model that holds an adapter.

    Raises:
        PaCAError: If it does: from_pretrained would apply the adapter to the merged model.
    """
    if Path(directory, "adapter_config.json").exists():
        raise PaCAError(
            f"{str(directory)!r} holds an adapter, which programs would apply to a merged model in the same directory. "
            "Choose another directory."
        )


@torch.no_grad()
def _plain_tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the base model's state dict with plain layers that hold the trained columns.

    Each is gathered when it is asked for, so that ranks have to ask for all of them.
    """
    linear4bit = linear4bit_class()
    kinds = (PaCALayer, NF4Linear) if linear4bit is None else (PaCALayer, NF4Linear, linear4bit)
    special = {clean_path(path): module for path, module in base.named_modules() if isinstance(module, kinds)}
    parameters = dict(base.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    tied: dict[int, Tensor] = {}
    for name, tensor in base.state_dict().items():
        key, owner = clean_path(name), id(parameters.get(name))
        if key.endswith(f".{ROWS}"):  # the weight has them
            continue
        if not key.endswith(".bias") and any(place in special for place in (*_parents(key), key)):  # comes below
            continue
        whole = tied[owner] if owner in tied else whole_tensor(_narrow(tensor))
        if uses[owner] > 1:  # one memory for all its names, so that save_pretrained writes one of them
            tied[owner] = whole
        yield key, whole
    for path, module in special.items():
        name = module.base_path(path) if isinstance(module, PaCAExperts) else f"{path}.weight"
        yield name, whole_tensor(_dense_weight(path, module))


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _narrow(tensor: Tensor) -> Tensor:
    return tensor.to(DTYPE) if tensor.is_floating_point() else tensor


def _dense_weight(path: str, module: nn.Module) -> Tensor:
    """A layer's weight in the layout of its plain class, in bf16, with the trained columns. Sharded like the layer."""
    if isinstance(module, QPaCALinear):
        shape = (module.out_features, module.in_features)
        weight = sharded_like(module.dequantize(DTYPE), module.packed, shape)
        return weight.t() if module.paca_base_class.__name__ == "Conv1D" else weight
    if isinstance(module, PaCALayer | NF4Linear):
        return _narrow(module.weight)
    if (obstacle := linear4bit_obstacle(module)) is not None:
        raise PaCAError(f"{path!r} cannot be exported: {obstacle}.")
    packed, scales, _ = from_linear4bit(module, path)
    return dequantize_rows(packed, scales, 2 * packed.shape[1], DTYPE)
