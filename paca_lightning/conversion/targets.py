"""Which modules a configuration means: names to layers, and why the others are left alone."""

import sys
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from paca_lightning.conversion.forward_check import computes_as_linear
from paca_lightning.conversion.frozen_by_hand import frozen_by_hand
from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.mismatch import no_match, nothing_matched
from paca_lightning.conversion.quantized import quantized_obstacle
from paca_lightning.conversion.stacked import experts_obstacle, holder_of, weight_name, weight_of
from paca_lightning.core.config import ALL_LINEAR, PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import matches, matches_wholly
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import is_expanded
from paca_lightning.layers.experts import ExpertWeight, PaCAExperts
from paca_lightning.layers.linear import PaCAConv1D, PaCALinear
from paca_lightning.layers.linear4bit import linear4bit_class, linear4bit_obstacle
from paca_lightning.layers.nf4_linear import QPaCALinear
from paca_lightning.layers.nf4_plain import NF4Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OUTPUT_HEAD = "output head"
CLASS_HEAD = "output head, frozen: list it in modules_to_save to train it"
FROZEN = "frozen before the conversion (include_frozen=True converts it)"


@dataclass(frozen=True)
class Target:
    """A linear layer to convert, with its settings."""

    path: str
    module: nn.Module
    layer_class: type[PaCALayer]
    r: int
    alpha: float

    @property
    def scaling(self) -> float:
        """Factor on the delta."""
        return self.alpha / self.r


@dataclass
class Resolution:
    """What a configuration means in one model: each dictionary by module path.

    Attributes:
        targets: The layers to convert.
        skipped: Reason why each other linear layer is left alone.
        thawed: Class of the model that was frozen as a whole and is converted all the same.
        saved: The modules that are trained whole.
        excluded: The modules that match ``exclude_modules``.
    """

    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    thawed: str | None = None
    saved: dict[str, nn.Module] = field(default_factory=dict)
    excluded: set[nn.Module] = field(default_factory=set)


def base_class_of(module: nn.Module) -> type[nn.Module] | None:
    """The linear class of a module: ``nn.Linear``, one in NF4, ``Conv1D``, stacked experts' weights, or None."""
    return next((base for base in _layer_classes() if isinstance(module, base)), None)


def _layer_classes() -> dict[type[nn.Module], type[PaCALayer]]:
    # A model holds Hugging Face's Conv1D only after transformers was imported: no need to import it here.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    linear4bit = linear4bit_class()
    # Linear4bit is a subclass of nn.Linear, so it comes first.
    classes: dict[type[nn.Module] | None, type[PaCALayer]] = {
        ExpertWeight: PaCAExperts,
        linear4bit: QPaCALinear,
        NF4Linear: QPaCALinear,
        nn.Linear: PaCALinear,
        conv1d: PaCAConv1D,
    }
    return {base: layer_class for base, layer_class in classes.items() if base is not None}


def in_features_of(module: nn.Module) -> int:
    """Size of the input of a linear layer; Hugging Face's ``Conv1D`` calls it ``nx``."""
    size: int = module.in_features if hasattr(module, "in_features") else module.nx  # type: ignore[assignment]
    return size


def resolve(
    inventory: Inventory,
    config: PaCAConfig,
    *,
    was_trainable: Mapping[str, bool] | None = None,
    given: Container[str] = (),
    left: Container[str] = (),
) -> Resolution:
    """Find the layers that a configuration names.

    Args:
        inventory: Of any model. Layers that are PaCA layers already count as linear layers.
        config: The settings.
        was_trainable: Which parameters required a gradient before an earlier conversion froze them, by name.
        given: Layers to convert even if they are frozen, by path or by path from the base model.
        left: Layers that ``all-linear`` leaves alone as if they were frozen, by either path.

    Returns:
        The layers to convert, the linear layers left alone with their reasons, and the modules trained whole.

    Raises:
        PaCAError: If a name matches nothing, or names a layer that cannot be converted.
    """
    names = {module: inventory.names(module) for module in inventory.paths if module is not inventory.root}
    linears = {module: names[module] for module in names if isinstance(module, PaCALayer) or base_class_of(module)}
    result = Resolution(saved=_saved_modules(config, names, inventory))
    inside_saved = {child for module in result.saved.values() for child in module.modules()}
    inside_saved |= {m for m in linears if isinstance(m, ExpertWeight) and m.owner in inside_saved}
    chosen = _chosen(config, linears, inventory)
    leaves = {m: n for m, n in names.items() if next(m.children(), None) is None}  # norms, too
    excludable = leaves | linears if config.train_norms or config.train_biases else linears
    excluded = result.excluded = _matched_by(config.exclude_modules, excludable, "exclude_modules", inventory)
    obstacles = {module: _obstacle(module, inventory, config) for module in linears}
    if config.target_modules == ALL_LINEAR and not config.include_frozen:
        convertible = [m for m in linears if obstacles[m] is None and m not in excluded and m not in inside_saved]
        frozen, result.thawed = frozen_by_hand(inventory, convertible, was_trainable or {})
        stay = {module for module in convertible if any(name in left for name in names[module])}
        # Of two Hugging Face models, of which one is frozen, layers may have the same name: it means the other one's.
        free = {name for module in convertible if module not in {*frozen, *stay} for name in names[module]}
        asked = {m for m in frozen if m not in stay and any(name in given and name not in free for name in names[m])}
        obstacles |= {module: FROZEN for module in (*frozen, *stay) if module not in asked}
    for module in linears:
        path, obstacle = inventory.paths[module][0], obstacles[module]
        if module in excluded:
            result.skipped[path] = "excluded by exclude_modules"
        elif module in inside_saved:
            result.skipped[path] = "trained whole (modules_to_save)"
        elif module not in chosen:
            result.skipped[path] = "not in target_modules"
        elif obstacle is None or (obstacle in (OUTPUT_HEAD, CLASS_HEAD) and config.target_modules != ALL_LINEAR):
            result.targets.append(_target(path, module, names[module], config))  # a head that is named is trained
        elif config.target_modules == ALL_LINEAR:
            result.skipped[path] = obstacle
        else:
            raise PaCAError(
                f"target_modules names {path!r}, which cannot be converted: {obstacle}. List it in exclude_modules."
            )
    _check_patterns_used(config, result.targets, inventory)
    if not result.targets:
        raise PaCAError(nothing_matched(config, linears, result.skipped, inventory))
    return result


def _chosen(config: PaCAConfig, linears: dict[nn.Module, set[str]], inventory: Inventory) -> set[nn.Module]:
    patterns = config.target_modules
    if patterns == ALL_LINEAR:
        return set(linears)
    if isinstance(patterns, str):
        return {module for module, names in linears.items() if any(matches_wholly(patterns, name) for name in names)}
    return _matched_by(patterns, linears, "target_modules", inventory)


def _matched_by(
    patterns: Iterable[str], modules: dict[nn.Module, set[str]], setting: str, inventory: Inventory
) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for pattern in patterns:
        hits = {module for module, names in modules.items() if any(matches(pattern, name) for name in names)}
        if not hits:
            raise PaCAError(no_match(setting, pattern, modules, inventory))
        found |= hits
    return found


def _saved_modules(config: PaCAConfig, names: dict[nn.Module, set[str]], inventory: Inventory) -> dict[str, nn.Module]:
    with_parameters = {m: n for m, n in names.items() if next(m.parameters(), None) is not None}
    found = _matched_by(config.modules_to_save, with_parameters, "modules_to_save", inventory)
    return {inventory.paths[module][0]: module for module in names if module in found}


def _target(path: str, module: nn.Module, names: set[str], config: PaCAConfig) -> Target:
    def key_of(patterns: Iterable[str]) -> str | None:
        return next((key for key in patterns if any(matches(key, name) for name in names)), None)

    base_class = base_class_of(module)
    layer_class = type(module) if isinstance(module, PaCALayer) else _layer_classes()[base_class]  # type: ignore[index]
    in_features = in_features_of(module)
    r = config.rank_of(key_of(config.rank_pattern))
    if r > in_features:
        raise PaCAError(
            f"r={r} is more than the {in_features} input columns of {path!r}. Lower r, or use rank_pattern."
        )
    return Target(path, module, layer_class, r, config.alpha_of(key_of(config.alpha_pattern), r))


def _obstacle(module: nn.Module, inventory: Inventory, config: PaCAConfig) -> str | None:
    """The reason why a linear layer cannot be converted, or not unless it is named; None if it can."""
    called = holder_of(module)
    if called in inventory.unreachable:
        return inventory.unreachable[called]
    weight = weight_of(module)
    own_name = weight_name(module, inventory.paths[module][0])
    ties = [name for name in inventory.owners.get(weight, ()) if name != own_name] if weight is not None else []
    if ties:
        return f"weight tied to {ties[0]}"
    if module in inventory.heads.all:
        return CLASS_HEAD if module in inventory.heads.over_classes else OUTPUT_HEAD
    if isinstance(module, ExpertWeight) and (obstacle := experts_obstacle(module, config)) is not None:
        return obstacle
    if isinstance(module, PaCALayer | NF4Linear):
        return None
    if (obstacle := quantized_obstacle(module)) is not None:
        return obstacle
    if parametrize.is_parametrized(module) or weight is None:
        masked = hasattr(module, "weight_mask")
        return "its weight has a pruning mask" if masked else "its weight is parametrized"
    base_class = base_class_of(module)
    assert base_class is not None
    if base_class is not ExpertWeight and ("forward" in vars(module) or not computes_as_linear(module, base_class)):
        return f"{type(module).__name__} has a forward of its own"
    if base_class is linear4bit_class():
        return linear4bit_obstacle(module)
    if is_expanded(weight):
        return "its weight is an expanded view, whose elements share memory; make it contiguous"
    return None if weight.dtype in DTYPES else f"its weight is {weight.dtype}"


def _check_patterns_used(config: PaCAConfig, targets: list[Target], inventory: Inventory) -> None:
    converted = {target.module: inventory.names(target.module) for target in targets}
    if converted:
        _matched_by(config.rank_pattern, converted, "rank_pattern", inventory)
        _matched_by(config.alpha_pattern, converted, "alpha_pattern", inventory)
