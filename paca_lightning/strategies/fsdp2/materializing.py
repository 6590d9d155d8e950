"""Allocating and filling a sharded model that was built on the meta device."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import apply_to_tensors, non_persistent_buffers
from paca_lightning.core.private.transformers import initialise, initialises
from paca_lightning.layers.base import paca_layers
from paca_lightning.layers.nf4_linear import QPaCALinear
from paca_lightning.layers.rows import row_modules
from paca_lightning.strategies.fsdp2.streaming import stream

SOURCE = "checkpoint_directory"
"""Attribute of a module on meta: the directory with its checkpoint, whose tensors are named as in the module."""


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Allocate all tensors on meta and fill them: from the checkpoint that a module names, or by initialising modules.

    Buffers that no checkpoint holds, such as rotary frequencies, are computed by Hugging Face's ``_init_weights`` or by
    the module's ``reset_parameters``.

    Args:
        model: Sharded, so that each rank allocates its rows only.
        device: Device to allocate on.
        cpu_offload: Allocate parameters in host memory instead.

    Raises:
        PaCAError: If a module has no way to initialise itself, or a checkpoint does not fit the model.
    """
    on_meta = {module: _meta_tensors(module) for module in model.modules()}
    if not any(on_meta.values()):
        return
    if rows := next((path for path, module in row_modules(model) if module.weight.is_meta), None):
        raise PaCAError(
            f"{rows!r} was given new tokens on the meta device, and no checkpoint holds their rows. Load the weights "
            "before: CausalLMModule(new_tokens=...) does so."
        )
    sources = [module for module in model.modules() if getattr(module, SOURCE, None) is not None]
    _allocate(model, device, cpu_offload)
    loaded = {child for source in sources for child in source.modules()}
    initialisers = _initialisers(model)
    for path, module in model.named_modules():
        computed = non_persistent_buffers(module) if module in loaded else on_meta[module]
        if on_meta[module].intersection(computed):
            _initialise(module, initialisers.get(module), path)
    for path, layer in paca_layers(model):
        if on_meta[layer] and layer not in loaded:
            if isinstance(layer, QPaCALinear):
                raise PaCAError(f"{path!r} is quantized but has no weights: set {SOURCE} on the model.")
            local(layer.paca_delta).zero_()
            layer.begin_from_weight()
    for source in sources:
        stream(source, getattr(source, SOURCE))


def _meta_tensors(module: nn.Module) -> set[str]:
    tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return {name for name, tensor in tensors if tensor.is_meta}


def _allocate(model: nn.Module, device: torch.device, cpu_offload: bool) -> None:
    """Allocate every tensor on meta, uninitialised. Modules that shared a parameter share it afterwards."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))

    def allocate(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return torch.empty_like(tensor, device="cpu" if cpu_offload and isinstance(tensor, DTensor) else device)

    apply_to_tensors(model, allocate)
    for (first, first_name), *others in owners.values():
        for module, name in others:
            setattr(module, name, getattr(first, first_name))


def _initialisers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each module, the innermost Hugging Face model that contains it."""
    outer_first = [module for module in model.modules() if initialises(module)]
    return {child: owner for owner in outer_first for child in owner.modules()}


def _initialise(module: nn.Module, owner: nn.Module | None, path: str) -> None:
    if owner is not None:
        initialise(owner, module)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    else:
        raise PaCAError(
            f"{path!r} ({type(module).__name__}) is on the meta device and cannot be initialised: give it a "
            f"reset_parameters method, build it on a real device, or set {SOURCE} on the model."
        )
