"""Loading a state dict into a PaCA layer: any mix of base weight, indices, delta and steps."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paca_lightning.core.dtensor import local

if TYPE_CHECKING:
    from paca_lightning.layers.base import PaCALayer


def load_columns(
    layer: "PaCALayer", state_dict: dict[str, Any], prefix: str, load: Callable[..., None], *args: Any
) -> None:
    """Load what a state dict has of a layer, and bring its weight up to date.

    Args:
        layer: The layer.
        state_dict: Of the whole model; what it has of this layer was checked.
        prefix: Of the layer's names in it.
        load: PyTorch's own loading of one module, called with the state dict, the prefix and ``args``.
        *args: Its further arguments.
    """
    indices = state_dict.get(prefix + "paca_indices")
    has_base = prefix + layer.base_name in state_dict
    if indices is not None and not layer.base.is_meta and not has_base:
        layer.move_to_columns(local(indices).to(layer.paca_indices.device))
    _agree_on_steps(layer, state_dict, prefix + "paca_scale")
    load(state_dict, prefix, *args)
    if layer.base.is_meta:
        return
    if layer.paca_delta.is_meta and not hasattr(layer.base, "to_local"):
        _follow_from_meta(layer)
    if has_base and prefix + "paca_base_columns" not in state_dict:
        local(layer.paca_base_columns).copy_(layer._read_columns())
    layer.write_columns()


def _agree_on_steps(layer: "PaCALayer", state_dict: dict[str, Any], key: str) -> None:
    """Take over each column's step, also where only one side has some: without, all steps are 1."""
    if key in state_dict and layer.paca_scale is None:
        layer.paca_scale = torch.ones_like(state_dict[key], device=layer.paca_indices.device)
    elif key not in state_dict and layer.paca_scale is not None and key.replace("scale", "delta") in state_dict:
        state_dict[key] = torch.ones_like(layer.paca_scale)


def _follow_from_meta(layer: "PaCALayer") -> None:
    """Create what ``load_state_dict(assign=True)`` left on meta: only the base weight became real."""
    device, trained = layer.base.device, layer.paca_delta.requires_grad
    layer.paca_delta = nn.Parameter(torch.zeros_like(layer.paca_delta, device=device), requires_grad=trained)
    layer.paca_indices = layer.paca_indices.to(device)
    layer.paca_base_columns = nn.Parameter(layer._read_columns(), requires_grad=False)
