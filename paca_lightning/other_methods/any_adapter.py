"""The adapter of a run's module, whichever method trains it: PaCA's columns or another method's parameters."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from paca_lightning.adapters.adapter import gather_adapter
from paca_lightning.core.dtensor import is_first_rank
from paca_lightning.layers.base import paca_layers
from paca_lightning.other_methods.adapted import adapted_model


def trains_adapter(module: nn.Module) -> bool:
    """Whether a method trains an adapter of the module."""
    return adapted_model(module) is not None or any(paca_layers(module))


def save_trained(module: nn.Module, directory: Path) -> None:
    """Write the adapter of a module. Collective: call it on every rank, of which the first writes.

    Raises:
        PaCAError: If training diverged, or the directory cannot be written.
    """
    write = gather_trained(module)
    if is_first_rank():
        write(directory)


def gather_trained(module: nn.Module) -> Callable[[Path], None]:
    """Gather the adapter of a module. Collective: call it on every rank.

    Returns:
        Writes the adapter to a directory, on the first rank alone.

    Raises:
        PaCAError: On all ranks, if training diverged. Writing raises it, too.
    """
    adapted = adapted_model(module)
    return gather_adapter(module) if adapted is None else adapted.save
