"""Fingerprints of base models: a few values of the columns that an adapter or a checkpoint was trained on."""

import math

from torch import Tensor, nn

from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.core.dtensor import is_sharded
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
    return columns.reshape(-1)[positions].double().tolist()


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


def base_samples(model: nn.Module) -> dict[str, list[float]] | None:
    """Some values of each PaCA layer's base columns, by path; None where they are sharded over ranks."""
    layers = take_inventory(model).named_layers()
    if any(is_sharded(layer.paca_base_columns) for layer in layers.values()):
        return None
    return {path: sample_columns(layer.paca_base_columns) for path, layer in layers.items()}


def check_base(saved: dict[str, list[float]], model: nn.Module, *, hint: str = "") -> None:
    """Compare a model, into which a checkpoint was loaded, with the base model of the checkpoint.

    Args:
        saved: What :func:`base_samples` gave when the checkpoint was saved.
        model: The converted model. One that is sharded is not compared.
        hint: Ends the error's message.

    Raises:
        PaCAError: If they differ by more than rounding.
    """
    if (here := base_samples(model)) is None:
        return
    quantized = any(isinstance(module, QPaCALinear) for module in model.modules())
    path = differing_layer(saved, here, QUANTIZED_TOLERANCE if quantized else TOLERANCE)
    if path is not None:
        raise PaCAError(
            f"The checkpoint was saved by a run on another base model: its weights differ from those here, most in "
            f"{path!r}. Give the model that the run began with.{hint}"
        )
