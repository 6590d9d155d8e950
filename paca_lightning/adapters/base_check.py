"""Checkpoints have no base weights, but remember some of their values: a run on another base model is refused."""

from typing import Any

from torch import nn

from paca_lightning.adapters.fingerprint import QUANTIZED_TOLERANCE, TOLERANCE, differing_layer, sample_columns
from paca_lightning.conversion.targets import layers_by_path
from paca_lightning.core.dtensor import is_sharded
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.nf4_linear import QPaCALinear

KEY = "paca_base"


def remember_base(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put some values of a module's base columns into a checkpoint, unless they lie on several ranks.

    Args:
        checkpoint: Lightning's.
        module: Converted.
    """
    if (samples := _samples(module)) is not None:
        checkpoint[KEY] = samples


def check_base(saved: dict[str, list[float]], module: nn.Module) -> None:
    """Compare a module, into which a checkpoint was loaded, with the base model of the checkpoint.

    Args:
        saved: What :func:`remember_base` had put there.
        module: Converted.

    Raises:
        PaCAError: If they differ by more than rounding.
    """
    if (here := _samples(module)) is None:
        return
    quantized = any(isinstance(layer, QPaCALinear) for layer in layers_by_path(module).values())
    path = differing_layer(saved, here, QUANTIZED_TOLERANCE if quantized else TOLERANCE)
    if path is not None:
        raise PaCAError(
            f"The checkpoint was saved by a run on another base model: its weights differ from those here, most in "
            f"{path!r}. Give the model that the run began with."
        )


def _samples(module: nn.Module) -> dict[str, list[float]] | None:
    """Some values of each layer's base columns, by path; None where they lie on several ranks."""
    layers = layers_by_path(module)
    if any(is_sharded(layer.paca_base_columns) for layer in layers.values()):
        return None
    return {path: sample_columns(layer.paca_base_columns) for path, layer in layers.items()}
