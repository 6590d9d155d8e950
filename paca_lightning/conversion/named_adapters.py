"""Several adapters on one base model, by name: one is active, which is what the model is converted to; others wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from paca_lightning.conversion.parked import ParkedAdapter, park, put_back
from paca_lightning.conversion.revert import unload
from paca_lightning.conversion.state import ADAPTERS, conversions_in
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError, did_you_mean
from paca_lightning.layers.base import paca_layers
from paca_lightning.layers.linear4bit import linear4bit_class, linear4bit_obstacle
from paca_lightning.layers.nf4_linear import QPaCALinear
from paca_lightning.layers.nf4_plain import NF4Linear

UNNAMED = "default"
"""Name of an adapter that was trained, or loaded without a name, before others were loaded by name."""


@dataclass(eq=False)
class NamedAdapters:
    """The adapters of a model.

    Attributes:
        root: The model.
        waiting: Those that are not active, by name.
    """

    root: nn.Module
    waiting: dict[str, ParkedAdapter] = field(default_factory=dict)

    @property
    def active(self) -> str | None:
        """Name of the adapter that the model computes with; None: the base model."""
        for _, layer in paca_layers(self.root):
            conversion = layer.paca_conversion
            return UNNAMED if conversion is None or conversion.name is None else conversion.name
        return None

    @property
    def names(self) -> list[str]:
        """Of all adapters."""
        active = self.active
        return sorted({*self.waiting, *([] if active is None else [active])})

    def check_known(self, name: str) -> None:
        """Raise a PaCAError if there is no adapter of that name."""
        if name not in self.names:
            there = f"Loaded: {', '.join(map(repr, self.names))}." if self.names else "None is loaded."
            raise PaCAError(f"There is no adapter {name!r}.{did_you_mean(name, self.names)} {there}")

    def check_free(self, name: str) -> None:
        """Raise a PaCAError if a new adapter cannot have a name."""
        if not name:
            raise PaCAError("The name of an adapter is empty.")
        if name in self.names:
            raise PaCAError(
                f"There is an adapter {name!r} already. Give another name, or delete_adapter(model, {name!r})."
            )

    def put_aside(self, action: str) -> str | None:
        """Make the model its base model, and keep the adapter that was active; returns its name."""
        active = self.active
        if active is None:
            return None
        if active in self.waiting:  # the model was converted while another one waited
            raise PaCAError(
                f"The model trains an adapter without a name, which would be {active!r}, and there is one. "
                f"delete_adapter(model, {active!r}), or save the model's and load it by another name."
            )
        self.waiting[active] = park(self.root, action)
        self._rename(active)
        return active

    def take_up(self, name: str | None) -> None:
        """Make the base model the one with a waiting adapter."""
        if name is not None:
            put_back(self.root, self.waiting[name])
            del self.waiting[name]

    def _rename(self, name: str) -> None:
        for columns in self.waiting[name].columns:
            if columns.conversion is not None:
                columns.conversion.name = name


def named_adapters(model: nn.Module) -> NamedAdapters | None:
    """The adapters that were loaded by name into a model, or into a module inside it; None if there are none."""
    return next((vars(module)[ADAPTERS] for module in model.modules() if ADAPTERS in vars(module)), None)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Compute with another adapter of those that were loaded by name, or with the base model, bitwise.

    Columns that change are written, and nothing else of the weights. Modules trained whole, norms, biases and running
    statistics change with the adapter. The active adapter is what the model is converted to: it trains, is saved and
    exported; the others keep their values, and their deltas are no parameters of the model meanwhile, so an optimizer
    is built after the switch. Switch outside of runs, and before a model is wrapped for several devices.

    Args:
        model: Into which adapters were loaded, or a module around it.
        name: Of the adapter; None: the base model, in plain linear layers.

    Raises:
        PaCAError: If there is no such adapter, the model is sharded or inside ``disable_paca``, or its base weights
            were changed since. The model is then as it was.
    """
    adapters = adapters_of(model)
    if name is not None:
        adapters.check_known(name)
    if name == adapters.active:
        return
    before = adapters.put_aside("set_adapter")
    try:
        adapters.take_up(name)
    except PaCAError:
        adapters.take_up(before)
        raise


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter that was loaded by name. If it is active, the model is the base model after that, bitwise.

    Args:
        model: Into which adapters were loaded, or a module around it.
        name: Of the adapter.

    Raises:
        PaCAError: If there is no such adapter, or it is active and the model is sharded or inside ``disable_paca``.
    """
    adapters = adapters_of(model)
    adapters.check_known(name)
    if name == adapters.active:
        unload(adapters.root)
    else:
        del adapters.waiting[name]


@contextmanager
def adding_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Inside this context the model is its base model; what it is converted to inside becomes the adapter of a name.

    If the block fails, the model has the adapters that it had before, and the same one is active.

    Raises:
        PaCAError: If the name is taken, or the active adapter cannot be put aside.
    """
    adapters = named_adapters(model) or NamedAdapters(model)
    adapters.check_free(name)
    before = adapters.put_aside("load_adapter")
    try:
        yield
    except BaseException:
        if adapters.active is not None:
            unload(adapters.root)
        adapters.take_up(before)
        raise
    vars(adapters.root)[ADAPTERS] = adapters
    for conversion, _, _ in conversions_in(adapters.root):
        conversion.name = name


def hold_quantized_base(model: nn.Module, config: PaCAConfig) -> None:
    """Make layers that bitsandbytes quantized ones that can lose their columns and get others; their bits stay.

    Raises:
        PaCAError: If the settings quantize a base that is not, or columns here started from the unquantized weight:
            others could not, as it is gone.
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, linear4bit_class() or ())}
    layers = {path: layer for path, layer in paca_layers(model) if isinstance(layer, QPaCALinear)}
    fresh = {path: layer for path, layer in layers.items() if layer.paca_base_class is not NF4Linear}
    exact = next((path for path, layer in fresh.items() if not layer.starts_quantized()), None)
    held = any(isinstance(module, NF4Linear) for module in model.modules())
    if exact is not None or (config.quantize is not None and not (found or layers or held)):
        where = f"quantize={config.quantize!r} of the adapter" if exact is None else f"{exact!r} of the model"
        raise PaCAError(
            f"Several adapters by name cannot each start from the unquantized weight ({where}): it is gone once the "
            "first one is there. Load the base model in NF4 (transformers' BitsAndBytesConfig), where columns start "
            "from quantized values, or load this adapter alone, without a name."
        )
    for module in found.values():
        if linear4bit_obstacle(module) is None and module.weight.quant_state is not None:  # type: ignore[union-attr]
            NF4Linear.adopt(module)
    for layer in fresh.values():
        layer.paca_base_class = NF4Linear


def adapters_of(model: nn.Module) -> NamedAdapters:
    """The adapters that were loaded by name into a model, or into a module inside it.

    Raises:
        PaCAError: If there are none.
    """
    adapters = named_adapters(model)
    if adapters is None:
        raise PaCAError(
            f"No adapter was loaded by name into this {type(model).__name__}: load_adapter(model, directory, "
            "name=...) does so. If it was into a module around it, pass that."
        )
    return adapters
