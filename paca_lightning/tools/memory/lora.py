"""LoRA with the operators and dtypes of PEFT 0.21, on layers of ours, which PEFT itself cannot adapt."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from paca_lightning.layers.experts import PaCAExperts


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


class LoRAExperts(PaCAExperts):
    """Frozen stacked experts with a LoRA adapter for each: PEFT computes the adapted weight of all in every forward.

    It stays in memory for the backward, beside the base weight.

    Attributes:
        lora_A: Weight of shape (experts * r, in_features).
        lora_B: Weight of shape (out_features, r * experts).
    """

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_dtype: torch.dtype | None

    @classmethod
    def adopt_experts(cls, layer: PaCAExperts, r: int, dtype: torch.dtype | None) -> None:
        """Turn frozen experts into ones with adapters, in place.

        Args:
            layer: Whose delta is not trained.
            r: Rank. Scaling 1.
            dtype: Of the adapter. None: the weight's, also when that changes.
        """
        layer.__class__ = cls
        cls._add_adapters(cast(LoRAExperts, layer), r, dtype)

    def _add_adapters(self, r: int, dtype: torch.dtype | None) -> None:
        device, count = self.weight.device, self.experts
        self.lora_A = nn.Linear(self.in_features, r * count, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r * count, self.out_features, bias=False, device=device, dtype=dtype)
        self.lora_dtype = dtype

    def forward(self) -> Tensor:  # type: ignore[override]
        """The adapted weight."""
        base, count = self.weight, self.experts
        rows = self.lora_A.weight.reshape(count, -1, self.in_features)
        columns = self.lora_B.weight.reshape(self.out_features, -1, count).permute(2, 0, 1)
        left, right = (rows.mT, columns.mT) if self.transposed else (columns, rows)
        return torch.baddbmm(base, left.to(base.dtype), right.to(base.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRAExperts":
        super()._apply(fn, recurse)
        if self.lora_dtype is not None:
            for adapter in (self.lora_A, self.lora_B):
                adapter.weight.data = adapter.weight.data.to(self.lora_dtype)
        return self
