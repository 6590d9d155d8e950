"""Norms and biases that are trained along with the columns (``train_norms``, ``train_biases``)."""

from collections.abc import Mapping

from torch import nn

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.stacked import weight_name
from paca_lightning.conversion.targets import Resolution, base_class_of
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import lies_in
from paca_lightning.layers.along import along_names
from paca_lightning.layers.base import PaCALayer


def is_norm(module: nn.Module) -> bool:
    """Whether a module has no parts and a weight that is a list of several numbers, as norms do."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    leaf = next(module.children(), None) is None
    return leaf and weight is not None and weight.dim() == 1 < weight.numel() and not isinstance(module, nn.PReLU)


def find_trained_along(
    inventory: Inventory, config: PaCAConfig, resolution: Resolution, was_trainable: Mapping[str, bool]
) -> dict[nn.Module, list[str]]:
    """The modules and names of the parameters to train along.

    Norms are those of the Hugging Face models in which layers are converted; beside these models, those beside
    converted layers. What was frozen by hand beside layers that were trainable stays frozen, as for ``all-linear``.
    Modules that are trained whole, or match ``exclude_modules``, are left out, and parameters that are shared.

    Args:
        inventory: Of the model.
        config: The settings.
        resolution: The layers to convert, and the modules that are trained whole.
        was_trainable: Whether a parameter required a gradient before an earlier conversion, by name.

    Raises:
        PaCAError: If the settings ask for norms or biases, and there are none.
    """
    if not (config.train_norms or config.train_biases):
        return {}
    targets = resolution.targets
    converted = {target.module for target in targets}
    scope = {_model_of(target.path, inventory) for target in targets}
    inside_saved = {part for module in resolution.saved.values() for part in module.modules()}

    def trainable(name: str) -> bool:
        return was_trainable.get(name, inventory.parameters[name].requires_grad)

    weights = [name for t in targets if (name := weight_name(t.module, t.path)) in inventory.parameters]
    frozen_as_a_whole = config.include_frozen or not any(trainable(name) for name in weights)
    found: dict[nn.Module, list[str]] = {}
    for module, (path, *_) in inventory.paths.items():
        norm = base_class_of(module) is None and not isinstance(module, PaCALayer) and is_norm(module)
        free_norm = norm and module not in resolution.excluded
        in_scope = module in converted or (free_norm and _model_of(path, inventory) in scope)
        if not in_scope or module in inside_saved:
            continue
        wanted = ["weight"] * (norm and config.train_norms) + ["bias"] * config.train_biases
        own = dict(module.named_parameters(recurse=False))
        names = {name: f"{path}.{name}" for name in wanted if name in own and len(inventory.owners[own[name]]) == 1}
        free = [name for name, full in names.items() if frozen_as_a_whole or trainable(full)]
        if chosen := list(along_names(module)) or free:
            found[module] = chosen
    for setting, name, kind in (("train_norms", "weight", "norm weight"), ("train_biases", "bias", "bias")):
        if getattr(config, setting) and not any(name in names for names in found.values()):
            raise PaCAError(
                f"{setting}=True, and there is no {kind} to train beside the {len(targets)} converted layers. Leave "
                "the setting out, or thaw what was frozen by hand."
            )
    return found


def _model_of(path: str, inventory: Inventory) -> str | None:
    """Path of the Hugging Face model in which a module lies; None beside them."""
    bases = inventory.base_models
    return next((base for base in bases if path == base or lies_in(path, base)), None)
