"""A frozen base in bitsandbytes' own NF4 layers, as QLoRA has it."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.targets import Target, resolve
from paca_lightning.core.config import PaCAConfig
from paca_lightning.layers.experts import ExpertWeight
from paca_lightning.layers.linear import PaCAConv1D
from paca_lightning.layers.linear4bit import linear4bit


def quantize_targets(model: nn.Module, targets: Iterable[Target]) -> None:
    """Replace layers of a model by bitsandbytes' NF4 layers; stacked experts stay as they are."""
    for target in targets:
        if isinstance(target.module, ExpertWeight):
            continue
        weight = target.module.get_parameter("weight")
        bias: Any = target.module.bias
        layer = linear4bit(weight.t() if target.layer_class is PaCAConv1D else weight, bias).train(model.training)
        model.set_submodule(target.path, layer)
    base: Any = take_inventory(model).base_model or model
    base.is_loaded_in_4bit = True  # tells PEFT that its layers are NF4


def quantize_base(model: nn.Module) -> int:
    """Quantize every linear layer of a model but its output heads; returns their number."""
    targets = resolve(take_inventory(model), PaCAConfig(quantize="nf4")).targets
    quantize_targets(model, targets)
    return len(targets)
