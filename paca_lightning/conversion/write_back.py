"""Writing the trained columns back into the weights, after each optimizer step."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from paca_lightning.core.dtensor import is_first_rank
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PENDING_SELECTION, PaCALayer, paca_layers


def write_columns(model: nn.Module) -> None:
    """Bring every PaCA weight in a model up to date with its delta."""
    for _, layer in paca_layers(model):
        layer.write_columns()


def layers_stepped_by(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, PaCALayer]:
    """The PaCA layers of a model, by path, whose delta is in an optimizer."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {path: layer for path, layer in paca_layers(model) if id(layer.paca_delta) in owned}


def attach(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Write the trained columns back after each step of an optimizer: for Fabric and plain PyTorch loops.

    Args:
        optimizer: Has some or all of the model's deltas.
        model: The converted model.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        PaCAError: If the optimizer has none of the model's deltas, moves them within a step (LBFGS), or columns were
            never chosen, or a weight is sharded otherwise than by rows.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PaCAError(
            "LBFGS evaluates the loss several times within a step, and the trained columns are written once after it. "
            "Use an optimizer that takes one gradient a step."
        )
    layers = layers_stepped_by(optimizer, model)
    if not layers:
        raise PaCAError(
            f"{type(optimizer).__name__} has none of the model's paca_delta parameters, so nothing would be trained. "
            "Build it after apply_paca."
        )

    if waiting := [path for path, layer in paca_layers(model) if PENDING_SELECTION in vars(layer)]:
        raise PaCAError(
            f"The columns of {waiting[0]!r} ({len(waiting)} such layers) were to be chosen by its weight, which was on "
            "the meta device at its conversion. Let FSDP2Strategy stream the weights, convert after loading them, or "
            "use selection='random'."
        )
    for path, layer in layers.items():
        if any(not (placement.is_shard(0) or placement.is_replicate()) for placement in _placements(layer.base)):
            raise PaCAError(
                f"{path!r} is split by columns (tensor parallelism), which PaCA does not support: the delta is split "
                "by rows. Leave the layer whole, or shard it with fully_shard."
            )
    checked = False

    def write_back(*_: object) -> None:
        nonlocal checked
        if not checked:
            checked = True
            _warn_of_idle([path for path, layer in layers.items() if layer.paca_delta.grad is None])
        for layer in layers.values():
            layer.write_columns()

    return optimizer.register_step_post_hook(write_back)


def _placements(tensor: torch.Tensor) -> tuple[Any, ...]:
    return getattr(tensor, "placements", ())


def _warn_of_idle(paths: list[str]) -> None:
    """Tell which layers the first step left alone."""
    if paths and is_first_rank():
        warnings.warn(
            f"{len(paths)} PaCA layers had no gradient in the first step ({paths[0]!r} is one). Experts that saw no "
            "token are like that; a layer whose weight the model reads without calling it never trains: list it in "
            "exclude_modules.",
            stacklevel=2,
        )
