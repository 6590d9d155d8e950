"""Inventory: the structure of a model as a conversion needs it, found in one pass over its modules."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from paca_lightning.conversion.bypassed import bypassed_linears
from paca_lightning.conversion.heads import Heads, find_heads, is_base_model
from paca_lightning.conversion.saved_modules import is_marked
from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path, lies_in
from paca_lightning.core.private.torch import non_persistent_buffers, storage_id
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.experts import expert_weights

ModuleType = TypeVar("ModuleType", bound=nn.Module)


@dataclass
class Inventory:
    """The structure of a model: modules, their paths, and who owns which parameter.

    Take one with :func:`take_inventory`. Layers that are converted later stay the same objects, so an inventory
    remains valid: ``layers`` and ``saved`` always tell the present state.

    Attributes:
        root: The model.
        paths: Every path of each module without wrappers' segments, the root's own empty one included. The first
            path names the module. Stacked weights of experts are among them as if they were modules.
        base_models: The outermost Hugging Face models by path.
        base_path: Path of the one that names count from: the first that is trained, or the first of all.
        parameters: Each parameter once, by its first name.
        buffers: Each persistent buffer outside PaCA layers, by its first name.
        owners: The names of all places that hold a parameter; several if it is tied.
        heads: Output heads.
        unreachable: Modules that another module replaces or bypasses, with the reason they cannot be converted.
        fsdp1: Path of the first module that is wrapped in FSDP1, or None.
    """

    root: nn.Module
    paths: dict[nn.Module, list[str]] = field(default_factory=dict)
    base_models: dict[str, nn.Module] = field(default_factory=dict)
    base_path: str = ""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[nn.Parameter, list[str]] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    unreachable: dict[nn.Module, str] = field(default_factory=dict)
    fsdp1: str | None = None

    @property
    def base_model(self) -> nn.Module | None:
        """The Hugging Face model that names count from, or None."""
        return self.base_models.get(self.base_path)

    @property
    def prefix(self) -> str:
        """``base_path`` with a dot behind it; empty if the root is the Hugging Face model or there is none.

        Column draws and adapter files count paths from there, so that a LightningModule and the bare model agree.
        """
        return f"{self.base_path}." if self.base_path else ""

    @property
    def layers(self) -> dict[str, PaCALayer]:
        """The PaCA layers by path, each once."""
        return {paths[0]: module for module, paths in self.paths.items() if isinstance(module, PaCALayer)}

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules that are trained whole, by path."""
        return {paths[0]: module for module, paths in self.paths.items() if is_marked(module)}

    def count_from_base_of(self, paths: Iterable[str]) -> None:
        """From now on count names from the first Hugging Face model with one of some layers; the first if none has."""
        layers = list(paths)
        trained = (base for base in self.base_models if any(lies_in(path, base) for path in layers))
        self.base_path = next(trained, next(iter(self.base_models), ""))

    def relative(self, path: str) -> str:
        """A path counted from the base model, where it lies inside."""
        return path.removeprefix(self.prefix)

    def names(self, module: nn.Module) -> set[str]:
        """All names of a module that a pattern may match: its paths from the root and from its Hugging Face model."""
        paths = self.paths[module]
        bases = [f"{base}." for base in self.base_models if base]
        return {*paths, *(path.removeprefix(base) for path in paths for base in bases)}

    def named_layers(self) -> dict[str, PaCALayer]:
        """The PaCA layers by their path from the base model, as adapter files name them."""
        return self._unambiguous(self.layers)

    def named_saved(self) -> dict[str, nn.Module]:
        """The modules trained whole by their path from the base model, as adapter files name them."""
        return self._unambiguous(self.saved)

    def _unambiguous(self, modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
        result: dict[str, ModuleType] = {}
        for path, module in modules.items():
            name = self.relative(path)
            if name in result:
                raise PaCAError(
                    f"Two layers are called {name!r}, one inside the base model and one beside it, and an adapter "
                    "tells them apart by that name. Rename the outer one, or list it in exclude_modules."
                )
            result[name] = module
        return result


def take_inventory(model: nn.Module) -> Inventory:
    """Walk a model once and note what a conversion needs to know.

    Args:
        model: Any module, converted or not.
    """
    inventory = Inventory(model)
    # peft is imported by whoever puts its layers into a model.
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    for raw_path, module in model.named_modules(remove_duplicate=False):
        path = clean_path(raw_path)
        inventory.paths.setdefault(module, []).append(path)
        if len(inventory.paths[module]) > 1:
            continue
        _note_tensors(inventory, module, path)
        for name, weight in expert_weights(module):
            inventory.paths[weight] = [f"{path}.{name}".lstrip(".")]
        if is_base_model(module) and not any(lies_in(path, outer) for outer in inventory.base_models):
            inventory.base_models[path] = module
        if isinstance(module, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention reads its weight without calling it"
            inventory.unreachable.update(dict.fromkeys(module.modules(), reason))
        for child in bypassed_linears(module):
            inventory.unreachable.setdefault(child, f"{type(module).__name__} reads its weight without calling it")
        if isinstance(module, tuner):
            reason = "part of a PEFT adapter (merge_and_unload() makes the model plain again)"
            inventory.unreachable.update(dict.fromkeys(module.modules(), reason))
        if inventory.fsdp1 is None and type(module).__name__ == "FullyShardedDataParallel":
            inventory.fsdp1 = path or type(module).__name__
    inventory.count_from_base_of(inventory.layers)
    _note_overlaps(inventory)
    inventory.heads = find_heads({paths[0]: module for module, paths in inventory.paths.items()})
    return inventory


def _note_tensors(inventory: Inventory, module: nn.Module, path: str) -> None:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        full_name = f"{path}.{clean_path(name)}" if path else clean_path(name)
        if parameter not in inventory.owners:
            inventory.parameters[full_name] = parameter
        inventory.owners.setdefault(parameter, []).append(full_name)
    if not isinstance(module, PaCALayer):
        skipped = non_persistent_buffers(module)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in skipped:
                inventory.buffers[f"{path}.{name}" if path else name] = buffer


def _note_overlaps(inventory: Inventory) -> None:
    """Make owners of the same memory owners of one another's parameters: a write to one changes the other."""
    by_storage: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in inventory.parameters.items():
        by_storage.setdefault(storage_id(local(parameter).untyped_storage()), []).append((name, parameter))
    for sharing in by_storage.values():
        for _, parameter in sharing if len(sharing) > 1 else ():
            others = [other for other, tensor in sharing if tensor is not parameter and _overlap(parameter, tensor)]
            inventory.owners[parameter].extend(others)


def _overlap(first: nn.Parameter, second: nn.Parameter) -> bool:
    """Whether two parameters of one storage have numbers in common, as far as their bounds tell."""

    def bounds(tensor: nn.Parameter) -> tuple[int, int]:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset())
        return start, start + reach

    (first_start, first_end), (second_start, second_end) = bounds(first), bounds(second)
    return first.numel() > 0 < second.numel() and first_start <= second_end and second_start <= first_end
