"""What an error says when a pattern of a configuration matches nothing: what there is, and what was probably meant."""

from collections.abc import Mapping

from torch import nn

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.quantized import packed_obstacle
from paca_lightning.core.config import ALL_LINEAR, PaCAConfig
from paca_lightning.core.errors import did_you_mean
from paca_lightning.core.paths import matches


def no_match(setting: str, pattern: str, modules: Mapping[nn.Module, set[str]], inventory: Inventory) -> str:
    """The message for a pattern that matches none of some modules.

    Args:
        setting: Where the pattern stands, such as ``target_modules``.
        pattern: A name or a regular expression.
        modules: What it could have matched: linear layers, or for ``modules_to_save`` all modules, with their names.
        inventory: Of the model.
    """
    kind = "no module" if setting == "modules_to_save" else "no linear layer"
    if setting == "target_modules" and (other := _something_else(pattern, inventory)) is not None:
        return f"{setting}: {pattern!r} matched {kind}: {other}"
    suffixes = _suffixes(modules)
    hint = did_you_mean(pattern, suffixes)
    return f"{setting}: {pattern!r} matched {kind}; suffixes present: {suffixes}.{hint}"


def nothing_matched(
    config: PaCAConfig, linears: Mapping[nn.Module, set[str]], skipped: Mapping[str, str], inventory: Inventory
) -> str:
    """The message for a configuration that leaves nothing to train.

    Args:
        config: The settings.
        linears: The linear layers with their names.
        skipped: Why each of them is left alone, by path.
        inventory: Of the model.
    """
    obstacles = {paths[0]: packed_obstacle(module) for module, paths in inventory.paths.items()}
    if packed := {path: obstacle for path, obstacle in obstacles.items() if obstacle is not None}:
        return f"There is nothing for PaCA to train. {_by_reason(packed)}."
    if not linears:
        return "The model has no linear layers, so there is nothing for PaCA to train."
    reasons = _by_reason(skipped)
    if config.target_modules == ALL_LINEAR:
        return (
            f"target_modules={ALL_LINEAR!r} matched no linear layer that can be converted: all {len(linears)} are left "
            f"alone. {reasons}."
        )
    hint = " A string is one regular expression of the whole path; pass a list for names." * isinstance(
        config.target_modules, str
    )
    return (
        f"target_modules={config.target_modules!r} matched no linear layer that can be converted; suffixes present: "
        f"{_suffixes(linears)}. Fix the name or pass {ALL_LINEAR!r}.{hint} Left alone: {reasons}."
    )


def _by_reason(left: Mapping[str, str]) -> str:
    """Layers that are left alone, by path, with the first five reasons: one layer of each, and how many more."""
    paths: dict[str, list[str]] = {}
    for path, reason in left.items():
        paths.setdefault(reason, []).append(path)
    named = [
        f"{first}{f' and {len(others)} more' if others else ''}: {reason}" for reason, (first, *others) in paths.items()
    ]
    return "; ".join(named[:5])


def _suffixes(modules: Mapping[nn.Module, set[str]]) -> list[str]:
    return sorted({name.rpartition(".")[2] for names in modules.values() for name in names})


def _something_else(pattern: str, inventory: Inventory) -> str | None:
    """What a pattern names that is no linear layer: a parameter such as fused experts, or another module."""
    parameters = {
        path: p for path, p in inventory.parameters.items() if _names(pattern, path, inventory) and p.dim() > 2
    }
    if parameters:
        path, parameter = next(iter(parameters.items()))
        more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
        shape = "x".join(map(str, parameter.shape))
        return (
            f"{path!r}{more} is a {parameter.dim()}-D parameter ({shape}), such as fused experts are, and PaCA trains "
            "columns of linear layers. Leave it out: it stays frozen, or list the module that holds it in "
            "modules_to_save."
        )
    others = {paths[0]: m for m, paths in inventory.paths.items() if _names(pattern, paths[0], inventory)}
    if others:
        path, module = next(iter(others.items()))
        if (obstacle := packed_obstacle(module)) is not None:
            return f"{path}: {obstacle}."
        return (
            f"{path!r} is {type(module).__name__}, and PaCA trains columns of linear layers. Name those inside it, or "
            "list it in modules_to_save to train it whole."
        )
    return None


def _names(pattern: str, path: str, inventory: Inventory) -> bool:
    return bool(path) and (matches(pattern, path) or matches(pattern, inventory.relative(path)))
