"""Methods to compare a run with, for their memory: LoRA, full fine-tuning, and the floor."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from lightning.pytorch import LightningModule
from torch import nn

from paca_lightning.conversion.convert import apply_paca
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.targets import resolve
from paca_lightning.core.config import PaCAConfig
from paca_lightning.layers.base import paca_layers
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.tools.bench.lora import lora_rank
from paca_lightning.tools.bench.methods import train_nothing
from paca_lightning.tools.memory.lora import LoRAExperts, LoRALinear


@dataclass(frozen=True)
class Baseline:
    """A method of fine-tuning.

    Args:
        name: As tables show it.
        convert: Changes a module whose model is on ``meta``; the configuration names the layers and their ranks.
    """

    name: str
    convert: Callable[[LightningModule, PaCAConfig], None]

    def converter(self, config: PaCAConfig | None) -> Callable[[LightningModule], None]:
        """The conversion of the layers that a configuration names; None: of PaCA's default layers."""
        return lambda module: self.convert(module, config or PaCAConfig())


def _paca(module: LightningModule, config: PaCAConfig) -> None:
    # The choice of columns makes no difference to memory.
    apply_paca(module, replace(config, selection="random"))


def _lora(module: LightningModule, config: PaCAConfig, dtype: torch.dtype | None = torch.float32) -> None:
    ranks = {target.path: target.r for target in resolve(take_inventory(module), config).targets}
    _floor(module, config)
    for path, layer in list(paca_layers(module)):
        features = layer.in_features, layer.out_features
        if isinstance(layer, PaCAExperts):
            LoRAExperts.adopt_experts(layer, lora_rank(ranks[layer.base_path(path)], *features), dtype)
            continue
        r = lora_rank(ranks[path], *features)
        quantized = config.quantize is not None
        module.set_submodule(path, LoRALinear(layer, features, r, dtype, quantized=quantized))
    module.idle.requires_grad_(False)


def _narrow_lora(module: LightningModule, config: PaCAConfig) -> None:
    _lora(module, config, None)


def _full(module: LightningModule, config: PaCAConfig) -> None:
    module.requires_grad_(True)


def _floor(module: LightningModule, config: PaCAConfig) -> None:
    # A PaCA layer with a frozen delta costs what a plain frozen layer does, quantized or not.
    apply_paca(module, replace(config, r=1, rank_pattern={}, alpha_pattern={}, selection="random"))
    module.requires_grad_(False)
    train_nothing(next(child for child in module.modules() if hasattr(child, "get_input_embeddings")))
    module.idle = nn.Parameter(torch.zeros(1, device="meta"))  # an optimizer needs a parameter


PACA = Baseline("PaCA", _paca)
LORA = Baseline("LoRA", _lora)
NARROW_LORA = Baseline("LoRA, adapters as narrow as the model", _narrow_lora)
FULL = Baseline("full fine-tuning", _full)
FLOOR = Baseline("floor", _floor)
