"""Weights of layers to convert, be they a layer's own or stacked experts', and why experts cannot be converted."""

from torch import nn

from paca_lightning.core.config import CALIBRATED, PaCAConfig
from paca_lightning.core.private.transformers import experts_implementation, splits_experts
from paca_lightning.layers.experts import ExpertWeight, PaCAExperts

IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")
"""The forwards of experts whose products are ones that the tap knows."""


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """The parameter that holds the weight of a linear layer or of stacked experts; None where there is none."""
    if isinstance(module, ExpertWeight):
        return module.get_parameter("weight")
    return dict(module.named_parameters(recurse=False)).get("weight")


def holder_of(module: nn.Module) -> nn.Module:
    """The module of the model that has the weight: a linear layer itself; of stacked experts, the experts module."""
    return module.owner if isinstance(module, ExpertWeight) else module


def weight_name(module: nn.Module, path: str) -> str:
    """Full name of the weight of the module at ``path``."""
    return path if isinstance(module, ExpertWeight) else f"{path}.weight"


def experts_obstacle(module: ExpertWeight, config: PaCAConfig) -> str | None:
    """The reason why stacked experts cannot be converted with some settings; None if they can."""
    if config.quantize is not None:
        return "stacked experts cannot be quantized to NF4"
    if config.selection in CALIBRATED:
        return f"selection={config.selection!r} looks at linear layers only, not at stacked experts"
    if config.steps_by_input:
        return "column_steps='input_rms' looks at linear layers only, not at stacked experts"
    if isinstance(module, PaCAExperts):
        return None
    if "forward" in vars(module.owner):
        return f"{type(module.owner).__name__} has a forward of its own"
    if splits_experts(module.owner):
        return "its experts are split over devices"
    kind = experts_implementation(getattr(module.owner, "config", None))
    if kind not in IMPLEMENTATIONS:
        return f"experts_implementation={kind!r} reads it in kernels of its own; load the model with 'grouped_mm'"
    return None
