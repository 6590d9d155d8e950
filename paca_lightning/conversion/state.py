"""Conversion: what a converted model knows of its conversion, in one object that its PaCA layers share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path
from paca_lightning.core.vocabulary import Room
from paca_lightning.layers.base import PaCALayer, paca_layers

ADAPTERS = "_paca_adapters"
"""Attribute of the module that adapters were loaded into by name. It is copied and pickled with the module."""


@dataclass(eq=False)
class Conversion:
    """What a converted model knows of its conversion.

    Every PaCA layer refers to it, so that it is found from the model, from a part of it and from a module around it.
    It is copied and pickled with the model, and gone after ``merge`` and ``unload``. Names count from the root: the
    module that was converted.

    Attributes:
        config: The settings.
        was_trainable: Whether each parameter of the root required a gradient before the conversion, by name.
        originals: Copies, in host memory, of what may change beside deltas and modules trained whole: of persistent
            buffers as they were at the conversion, and of thawed parameters as they were before their first step.
        frozen: Names of the parameters that a checkpoint leaves out.
        left: Paths of the linear layers that ``all-linear`` left alone, as they were frozen by hand.
        adapter: Directory of the adapter that was loaded. A later run with the same one goes on from it.
        full_checkpoints: Whether checkpoints keep the frozen parameters.
        columns_restored: Whether the columns that data was to choose came with a checkpoint.
        name: Of the adapter, if several were loaded by name.
        room: For the new tokens of an adapter, which a base model without them was given to load it.
    """

    config: PaCAConfig
    was_trainable: dict[str, bool] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    adapter: str | None = None
    full_checkpoints: bool = False
    columns_restored: bool = False
    name: str | None = None
    room: Room | None = None


def conversions_in(model: nn.Module) -> list[tuple[Conversion, str, PaCALayer]]:
    """Each conversion in a model, with the path and the layer that led to it."""
    return conversions_of({clean_path(path): layer for path, layer in paca_layers(model)})


def conversions_of(layers: Mapping[str, PaCALayer]) -> list[tuple[Conversion, str, PaCALayer]]:
    """Each conversion that some layers are part of, with the path and the layer that led to it."""
    found: dict[int, tuple[Conversion, str, PaCALayer]] = {}
    for path, layer in layers.items():
        if layer.paca_conversion is not None:
            found.setdefault(id(layer.paca_conversion), (layer.paca_conversion, path, layer))
    return list(found.values())


def conversion_of(model: nn.Module) -> Conversion | None:
    """The conversion of a model; None if it has none.

    Raises:
        PaCAError: If parts of the model were converted with different configurations.
    """
    found = conversions_in(model)
    for conversion, path, _ in found[1:]:
        if conversion.config != found[0][0].config:
            raise PaCAError(
                f"{found[0][1]!r} and {path!r} were converted with different configurations "
                f"(different: {conversion.config.differences(found[0][0].config)}), which one adapter cannot hold. "
                "Save each part on its own, such as save_adapter(model.encoder, directory)."
            )
    return found[0][0] if found else None


def config_of(model: nn.Module) -> PaCAConfig | None:
    """The configuration that a model was converted with; None if it was not."""
    conversion = conversion_of(model)
    return None if conversion is None else conversion.config


def rooted_conversion(inventory: Inventory, config: PaCAConfig) -> Conversion:
    """The conversion whose root is the inventory's: the present one, or a new one that takes over what others know.

    A part of the model may have been converted before it: a Hugging Face model inside a LightningModule.
    """
    layers = inventory.layers
    present = [layer.paca_conversion for layer in layers.values() if layer.paca_conversion is not None]
    same_root = all(layer.paca_path == path for path, layer in layers.items())
    if present and same_root and all(conversion is present[0] for conversion in present):
        conversion: Conversion = present[0]
    else:
        conversion = Conversion(config)
        for before, path, layer in conversions_of(layers):
            _take_over(conversion, before, _renaming(layer.paca_path, path))
    for path, layer in layers.items():
        layer.paca_conversion, layer.paca_path = conversion, path
    return conversion


def _take_over(conversion: Conversion, before: Conversion, renamed: Callable[[str], str | None]) -> None:
    for name, flag in before.was_trainable.items():
        if (own_name := renamed(name)) is not None:
            conversion.was_trainable[own_name] = flag
    for name, value in before.originals.items():
        if (own_name := renamed(name)) is not None:
            conversion.originals[own_name] = value
    conversion.left |= {own_path for path in before.left if (own_path := renamed(path)) is not None}
    conversion.adapter = conversion.adapter or before.adapter
    conversion.full_checkpoints |= before.full_checkpoints
    conversion.columns_restored |= before.columns_restored
    conversion.name = conversion.name or before.name
    conversion.room = conversion.room or before.room


def layers_left(inventory: Inventory) -> list[str]:
    """Linear layers that were left alone as they were frozen by hand, by path from the base model."""
    to_root = root_names(inventory.root)
    left = {path for conversion, _, _ in conversions_in(inventory.root) for path in conversion.left}
    return [inventory.relative(paths[0]) for paths in inventory.paths.values() if to_root(paths[0]) in left]


def root_names(model: nn.Module) -> Callable[[str], str | None]:
    """How names in a model read from the root of its conversion; None for what lies outside the root."""
    for _, path, layer in conversions_in(model):
        return _renaming(path, layer.paca_path)
    return lambda name: name


def _renaming(path: str, other_path: str) -> Callable[[str], str | None]:
    """How names counted from one module read from another, in which a layer has ``other_path`` instead of ``path``."""
    if not path:  # the model is the layer itself
        return lambda name: f"{other_path}.{name}"
    if other_path.endswith(path):
        prefix = other_path.removesuffix(path)
        return lambda name: prefix + name
    outer = path.removesuffix(other_path)
    return lambda name: name.removeprefix(outer) if name.startswith(outer) else None
