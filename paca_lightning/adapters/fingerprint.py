"""Telling base models apart by a few of the values that an adapter was trained on top of."""

import math

from torch import Tensor

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
