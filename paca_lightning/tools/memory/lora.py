"""LoRA with the operators and dtypes of PEFT 0.21, on layers of ours, which PEFT itself cannot adapt."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from paca_lightning.layers.experts import PaCAExperts


class LoRAFactors(nn.Module):
    """The matrices A and B of a LoRA adapter.

    Args:
        base: Of the layer, whose device they take.
        shapes: Of A and B.
        dtype: Theirs. None: the model's, also when that changes.
    """

    def __init__(
        self, base: nn.Module, shapes: tuple[tuple[int, int], tuple[int, int]], dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.dtype = dtype
        device = next(base.parameters()).device
        self.lora_A, self.lora_B = (
            nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype) for outputs, inputs in shapes
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRAFactors":
        super()._apply(fn, recurse)
        if self.dtype is not None:
            for factor in (self.lora_A, self.lora_B):
                factor.weight.data = factor.weight.data.to(self.dtype)
        return self


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
        self.base, self.quantized = base, quantized
        self.factors = LoRAFactors(base, ((r, features[0]), (features[1], r)), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The base layer's output and the adapter's."""
        result, factors = self.base(input), self.factors
        if self.quantized:
            result = result.clone()
        dtype = result.dtype
        if not torch.is_autocast_enabled(input.device.type):
            input = input.to(factors.lora_A.weight.dtype)
        return cast(Tensor, result + (factors.lora_B(factors.lora_A(input)) * 1.0).to(dtype))


class LoRAExperts(PaCAExperts):
    """Frozen stacked experts with a LoRA adapter for each: PEFT computes the adapted weight of all in every forward.

    It stays in memory for the backward, beside the base weight.

    Attributes:
        factors: A of shape (experts * r, in_features), B of shape (out_features, r * experts).
    """

    factors: LoRAFactors

    @classmethod
    def adopt_experts(cls, layer: PaCAExperts, r: int, dtype: torch.dtype | None) -> None:
        """Turn frozen experts into ones with adapters, in place.

        Args:
            layer: Whose delta is not trained.
            r: Rank. Scaling 1.
            dtype: Of the adapter. None: the weight's, also when that changes.
        """
        layer.__class__ = cls
        rank = r * layer.experts
        layer.factors = LoRAFactors(layer, ((rank, layer.in_features), (layer.out_features, rank)), dtype)

    def forward(self) -> Tensor:  # type: ignore[override]
        """The adapted weight."""
        base, count = self.weight, self.experts
        rows = self.factors.lora_A.weight.reshape(count, -1, self.in_features)
        columns = self.factors.lora_B.weight.reshape(self.out_features, -1, count).permute(2, 0, 1)
        left, right = (rows.mT, columns.mT) if self.transposed else (columns, rows)
        return torch.baddbmm(base, left.to(base.dtype), right.to(base.dtype))
