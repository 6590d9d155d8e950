"""Modules that are trained whole (``modules_to_save``), and what they were before."""

import torch
from torch import Tensor, nn

from paca_lightning.core.dtensor import copy_into, local
from paca_lightning.core.errors import PaCAError

ORIGINAL = "_paca_original"
"""Attribute of a module that is trained whole: its state before, or None if it was on the meta device then."""


def saved_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of what is trained whole."""
    return [(path, module) for path, module in model.named_modules() if is_marked(module)]


def original_state(module: nn.Module) -> dict[str, Tensor] | None:
    """A copy of a module's parameters and persistent buffers in host memory; None while they are on meta."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        return None
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def is_marked(module: nn.Module) -> bool:
    """Whether a module is trained whole."""
    return ORIGINAL in vars(module)


def mark(module: nn.Module, original: dict[str, Tensor] | None) -> None:
    """Note that a module is trained whole, with its original state."""
    vars(module)[ORIGINAL] = original


def unmark(module: nn.Module) -> None:
    """Forget that a module is trained whole."""
    del vars(module)[ORIGINAL]


def local_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of this rank's part of a module's parameters and persistent buffers."""
    return {name: local(tensor).detach().clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_local_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what ``local_state`` copied."""
    for name, tensor in module.state_dict().items():
        local(tensor).copy_(state[name])


@torch.no_grad()
def restore_original(module: nn.Module, path: str) -> None:
    """Give a module its original state.

    Raises:
        PaCAError: If it was converted on meta, before there was one.
    """
    original: dict[str, Tensor] | None = vars(module)[ORIGINAL]
    if original is None:
        raise PaCAError(
            f"{path!r} is trained whole and was converted on the meta device, so its original values are unknown. "
            "Load the base model again."
        )
    for name, tensor in module.state_dict().items():
        copy_into(tensor, original[name])
