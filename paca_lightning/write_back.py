"""Writing the trained columns back into the weights, after each optimizer step."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from paca_lightning.base_layer import PENDING_SELECTION
from paca_lightning.errors import PaCAError
from paca_lightning.targets import paca_layers


def write_columns(model: nn.Module) -> None:
    """Bring every PaCA weight in a model up to date with its delta."""
    for _, layer in paca_layers(model):
        layer.write_columns()


def attach(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Write the trained columns back after each step of an optimizer: for Fabric and plain PyTorch loops.

    Args:
        optimizer: Has some or all of the model's deltas.
        model: The converted model.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        PaCAError: If the optimizer has none of the model's deltas, or columns were never chosen.
    """
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [layer for _, layer in paca_layers(model) if id(layer.paca_delta) in owned]
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

    def write_back(*_: object) -> None:
        for layer in layers:
            layer.write_columns()

    return optimizer.register_step_post_hook(write_back)
