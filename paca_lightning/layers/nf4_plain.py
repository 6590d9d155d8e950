"""Frozen linear layers in NF4: what a quantized layer is while none of several adapters trains columns of it."""

from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.layers.casting import keeping_precision
from paca_lightning.layers.linear4bit import from_linear4bit, strip_linear4bit
from paca_lightning.layers.nf4 import Scales, dequantize_rows
from paca_lightning.layers.nf4_autograd import dequantized_linear


class NF4Linear(nn.Module):
    """Linear layer ``y = x W^T + b`` with a frozen ``W`` in NF4: a :class:`QPaCALinear` without columns.

    Attributes:
        packed: As of QPaCALinear, as the scales are.
        weight_dtype: Dtype of the weight before quantization.

    Shape:
        Input (..., in_features), output (..., out_features).
    """

    packed: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    weight_dtype: torch.dtype

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Turn a quantized ``bitsandbytes.nn.Linear4bit`` into one of this class, in place. Its bits are kept."""
        packed, scales, dtype = from_linear4bit(module)
        strip_linear4bit(module)
        module.__class__ = cls
        hold(module, packed, scales, dtype)

    @property
    def weight(self) -> Tensor:
        """The weight, dequantized at each access: some models, such as T5, read it."""
        with torch.no_grad():
            return dequantize_rows(self.packed, scales_of(self), self.in_features, self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The output, in the input's dtype or autocast's."""
        device, none = input.device.type, self.packed.new_empty(self.out_features, 0)
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        indices = none.new_empty(0, dtype=torch.int64)
        scales = scales_of(self)
        return dequantized_linear(input, self.bias, self.packed, scales, self.in_features, none, None, indices, 1.0)

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        """Move or cast the layer. Scales keep their dtype."""
        super()._apply(keeping_precision(fn, (), scales_of(self)), recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.packed.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def hold(module: Any, packed: Tensor, scales: Scales, dtype: torch.dtype) -> None:
    """Give a layer an NF4 weight.

    Args:
        module: An NF4Linear or QPaCALinear that has none.
        packed: Shape (out_features, padded in_features / 2), uint8.
        scales: As ``nf4.dequantize_rows`` takes them.
        dtype: Of the weight before quantization.
    """
    absmax, scale, phase, code, offset = scales if len(scales) > 1 else (*scales, None, None, None, None)
    for name, rows in (("packed", packed), ("absmax", absmax), ("absmax_scale", scale), ("absmax_phase", phase)):
        module.register_parameter(name, None if rows is None else nn.Parameter(rows, requires_grad=False))
    module.register_buffer("absmax_code", code, persistent=False)  # the same in every layer
    module.register_buffer("absmax_offset", offset)
    module.weight_dtype = dtype


def scales_of(module: Any) -> Scales:
    """The scales of a layer's NF4 weight, as ``nf4.dequantize_rows`` takes them."""
    nested = (module.absmax_scale, module.absmax_phase, module.absmax_code, module.absmax_offset)
    return (module.absmax, *(tensor for tensor in nested if tensor is not None))
