"""Which keys of a state dict belong to frozen parameters: a checkpoint leaves them out."""

from collections.abc import Iterator, Set
from typing import Any

from torch import nn

from paca_lightning.core.paths import clean_path


def frozen_names(module: nn.Module) -> set[str]:
    """Names of a module's frozen parameters, all names of tied ones."""
    named = module.named_parameters(remove_duplicate=False)
    return {clean_path(name) for name, parameter in named if not parameter.requires_grad}


def drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, frozen: Set[str]) -> None:
    """Remove frozen parameters from a module's state dict, unless they have been thawed since.

    Args:
        module: Whose state dict it is.
        state_dict: Perhaps of a module around it, too.
        prefix: What the module's keys begin with.
        frozen: Names of parameters to leave out.
    """
    thawed = {clean_path(name) for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    left_out = frozen - thawed
    for key in list(state_dict):
        if not key.startswith(prefix):  # of a sibling, if the module is inside another one
            continue
        name = clean_path(key.removeprefix(prefix))
        # Some quantized layers keep their scales beside the weight, as "weight.absmax".
        of_layer = name.endswith((".paca_delta", ".paca_indices", ".paca_scale"))  # experts' have their weight's path
        if name in left_out or (not of_layer and any(part in left_out for part in _with_parents(name))):
            del state_dict[key]


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def is_among(key: str, names: Set[str]) -> bool:
    """Whether a key, perhaps with the path of the module in front, is one of some names."""
    parts = clean_path(key).split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))
