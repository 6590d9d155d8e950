"""Methods to compare a run with, for their memory: LoRA, full fine-tuning, and the floor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from paca_lightning.conversion.convert import apply_paca
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.targets import resolve
from paca_lightning.core.config import PaCAConfig
from paca_lightning.layers.base import paca_layers
from paca_lightning.tools.bench.lora import lora_rank
from paca_lightning.tools.bench.methods import train_nothing


class LoRALinear(nn.Module):
    """A frozen linear layer and a LoRA adapter beside it, with the operators and dtypes of PEFT 0.21.

    PEFT itself cannot adapt a layer of ours, and its own NF4 layers cannot be sharded.

    Args:
        base: The layer.
        features: ``(in_features, out_features)``.
        r: Rank. Scaling 1 and no dropout; dropout needs more memory.
        dtype: Of the adapter. None: the model's, also when that changes.
        quantized: Whether the base is quantized: PEFT then copies its output.
    """

    def __init__(
        self, base: nn.Module, features: tuple[int, int], r: int, dtype: torch.dtype | None, *, quantized: bool
    ) -> None:
        super().__init__()
        self.base, self.dtype, self.quantized = base, dtype, quantized
        device = next(base.parameters()).device
        self.lora_A = nn.Linear(features[0], r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, features[1], bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output and the adapter's."""
        result = self.base(input)
        if self.quantized:
            result = result.clone()
        dtype = result.dtype
        if not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.lora_A.weight.dtype)
        return cast(Tensor, result + (self.lora_B(self.lora_A(input)) * 1.0).to(dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        super()._apply(fn, recurse)
        if self.dtype is not None:
            for adapter in (self.lora_A, self.lora_B):
                adapter.weight.data = adapter.weight.data.to(self.dtype)
        return self


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
