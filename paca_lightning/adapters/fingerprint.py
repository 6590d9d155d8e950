"""Fingerprints of base models: a few values of the columns that an adapter or a checkpoint was trained on."""

import math

from torch import Tensor, nn

from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.core.dtensor import gathered
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.nf4_linear import QPaCALinear

SAMPLES = 16
# Reading a model in bf16 instead of fp32 moves its values by 0.2% (root mean square); two fine-tunes of one model
# differ by more than this.
TOLERANCE = 0.005
# The columns of an NF4 layer made from quantized weights are off by about 9%.
QUANTIZED_TOLERANCE = 0.2


def sample_columns(columns: Tensor) -> list[float]:
    """Some values of a layer's base columns, evenly spread.

    Args:
        columns: Shape (out_features, r).

    Returns:
        At most 16 values.
    """
    last, count = columns.numel() - 1, min(SAMPLES, columns.numel())
    positions = [last * number // max(1, count - 1) for number in range(count)]
    return columns.reshape(-1)[positions].cpu().double().tolist()


def differing_layer(
    expected: dict[str, list[float]], found: dict[str, list[float]], tolerance: float = TOLERANCE
) -> str | None:
    """The layer that differs most between two base models, or None if they are the same up to rounding.

    Args:
        expected: Samples by layer path.
        found: The same of the other model.
        tolerance: Largest root-mean-square difference relative to the values, over all layers.
    """
    errors = {
        path: math.dist(values, found[path]) if len(values) == len(found.get(path, ())) else math.inf
        for path, values in expected.items()
    }
    size = math.hypot(*(value for values in expected.values() for value in values))
    if math.hypot(*errors.values()) <= tolerance * size:
        return None
    return max(errors, key=lambda path: errors[path])


def base_samples(model: nn.Module) -> dict[str, list[float]]:
    """Some values of each PaCA layer's base columns, by path. Call it on every rank of a sharded model."""
    layers = take_inventory(model).named_layers()
    return {path: sample_columns(gathered(layer.paca_base_columns)) for path, layer in layers.items()}


def check_base(saved: dict[str, list[float]], model: nn.Module, *, hint: str = "") -> None:
    """Compare a model, into which a checkpoint was loaded, with the base model of the checkpoint.

    Call it on every rank of a sharded model.

    Args:
        saved: What :func:`base_samples` gave when the checkpoint was saved.
        model: The converted model.
        hint: Ends the error's message.

    Raises:
        PaCAError: If they differ by more than rounding.
    """
    here = base_samples(model)
    quantized = any(isinstance(module, QPaCALinear) for module in model.modules())
    path = differing_layer(saved, here, QUANTIZED_TOLERANCE if quantized else TOLERANCE)
    if path is not None:
        raise PaCAError(
            f"The checkpoint was saved by a run on another base model: its weights differ from those here, most in "
            f"{path!r}. Give the model that the run began with.{hint}"
        )
