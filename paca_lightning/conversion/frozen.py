"""What a conversion leaves frozen beside linear layers: named by kind, so that nothing is left out in silence."""

from dataclasses import dataclass

from torch import nn

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.targets import base_class_of


@dataclass(frozen=True)
class FrozenGroup:
    """Frozen parameters of one kind.

    Attributes:
        kind: What they are.
        example: Name of the first.
        tensors: How many there are.
        parameters: How many numbers they hold.
    """

    kind: str
    example: str
    tensors: int
    parameters: int


def frozen_groups(inventory: Inventory, frozen: dict[str, nn.Parameter]) -> list[FrozenGroup]:
    """Group frozen parameters by kind, the largest group first.

    Args:
        inventory: Of the converted model.
        frozen: Frozen parameters by name. Weights of linear layers are left out: the report has their reasons.
    """
    modules = {paths[0]: module for module, paths in inventory.paths.items()}
    groups: dict[str, list[str]] = {}
    for name, parameter in frozen.items():
        path, _, own_name = name.rpartition(".")
        module = modules[path]
        if base_class_of(module) is None or own_name == "bias":
            groups.setdefault(_kind(module, own_name, parameter), []).append(name)
    found = [
        FrozenGroup(kind, names[0], len(names), sum(frozen[name].numel() for name in names))
        for kind, names in groups.items()
    ]
    return sorted(found, key=lambda group: -group.parameters)


def _kind(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    class_name = type(module).__name__
    if isinstance(module, nn.Embedding) or "Embedding" in class_name:
        return "embeddings"
    if "Norm" in class_name:
        return "norms"
    if "Conv" in class_name and parameter.dim() > 2:
        return "convolutions"
    if name == "bias" or name.endswith("_bias"):
        return "biases"
    if parameter.dim() > 2:
        return f"{parameter.dim()}-D parameters that no linear layer holds (such as fused experts)"
    if parameter.dim() == 2:
        return "matrices that no linear layer holds (such as routers of experts)"
    return "other parameters"
