"""What PEFT's layout of an adapter has no place for: kept in a file of our own, and in checkpoints."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from paca_lightning.adapters.head import Head, head_entries, parse_head
from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.state import layers_left
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import NewTokens, declared_new_tokens, parse_new_tokens


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter tells beside its tensors.

    Attributes:
        config: The settings.
        scalings: Of each layer, by path.
        fingerprint: Samples of each layer's base columns, by path; None if sharded ranks of version 0.1.0 saved them.
        changed: Names of what else had changed.
        left: Paths of layers that were frozen by hand.
        checksums: Of each tensor, by name; None in files of version 0.1.0, and in checkpoints.
        head: The base model's head over labels, if it has one.
        new_tokens: That the base model's vocabulary was extended by, if any.
    """

    config: PaCAConfig
    scalings: dict[str, float]
    fingerprint: dict[str, list[float]] | None
    changed: list[str]
    left: list[str]
    checksums: dict[str, str] | None
    head: Head | None = None
    new_tokens: NewTokens | None = None


def settings_of(
    inventory: Inventory, config: PaCAConfig, changed: Iterable[str], samples: dict[str, list[float]] | None
) -> dict[str, Any]:
    """The settings of a converted model's adapter, as plain values that JSON can hold.

    Args:
        inventory: Of the model.
        config: The settings of its conversion.
        changed: Names of what else had changed.
        samples: Some values of each layer's base columns, by path, if they are at hand.
    """
    layers, base = inventory.named_layers(), inventory.base_model
    new = None if base is None else declared_new_tokens(base)
    return {
        "version": version("paca-lightning"),
        "config": config.to_dict(),
        "layers": {path: {"r": layer.r, "alpha": layer.scaling * layer.r} for path, layer in layers.items()},
        "left": layers_left(inventory),
        "changed": list(changed),
        "fingerprint": samples,
        "head": head_entries(inventory.base_model),
        "new_tokens": None if new is None else new.entries(),
    }


def parse_settings(content: dict[str, Any], source: str) -> AdapterSettings:
    """The settings from plain values.

    Args:
        content: As :func:`settings_of` gives them, perhaps damaged.
        source: What they were read from, for messages.

    Raises:
        PaCAError: If they are damaged.
    """
    try:
        sums = content.get("checksums")
        return AdapterSettings(
            config=PaCAConfig.from_dict(content["config"]),
            scalings={name: _finite(layer["alpha"]) / layer["r"] for name, layer in content["layers"].items()},
            fingerprint={name: list(map(_finite, values)) for name, values in content["fingerprint"].items()},
            changed=[str(name) for name in content.get("changed", [])],  # not in files of version 0.1.0
            left=[str(path) for path in content.get("left", [])],  # nor this
            checksums=None if sums is None else {str(name): str(value) for name, value in sums.items()},
            head=parse_head(content.get("head")),
            new_tokens=parse_new_tokens(content.get("new_tokens")),
        )
    except PaCAError as error:
        raise PaCAError(f"{source}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PaCAError(f"{source} is damaged ({type(error).__name__}: {error}). Save the adapter again.") from error


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)
