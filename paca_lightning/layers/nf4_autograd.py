"""A linear map whose weight is NF4 with trained columns, dequantized for each GEMM and freed after it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from paca_lightning.layers.autograd import scaling_argument
from paca_lightning.layers.columns import trained_columns
from paca_lightning.layers.nf4 import Scales, dequantize_rows


def dequantized_linear(
    input: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scales: Scales,
    in_features: int,
    columns: Tensor,
    delta: Tensor | None,
    indices: Tensor,
    scaling: float | Tensor,
) -> Tensor:
    """``input @ W.T + bias``. W is dequantized in the forward, and in the backward if the input needs a gradient.

    No activation is saved. The delta gets no gradient here: the tap gives it one.

    Args:
        input: Shape (..., in_features), in the dtype to compute in.
        bias: Shape (out_features,).
        packed: NF4 weight, shape (out_features, padded in_features / 2), uint8.
        scales: Scales of its blocks.
        in_features: Columns of the weight without padding.
        columns: Base columns, shape (out_features, r).
        delta: Update of the columns, shape (out_features, r). None: the plain NF4 base.
        indices: Selected columns, shape (r,), int64.
        scaling: ``alpha / r``, or a number for each column, shape (r,).

    Returns:
        Shape (..., out_features), in the input's dtype.
    """
    factor = scaling_argument(scaling, columns)
    output: Tensor = _DequantizedLinear.apply(
        input, bias, packed, in_features, columns, None if delta is None else delta.detach(), indices, factor, *scales
    )
    return output


def merged_weight(
    packed: Tensor,
    scales: Scales,
    in_features: int,
    dtype: torch.dtype,
    columns: Tensor,
    delta: Tensor | None,
    indices: Tensor,
    scaling: float | Tensor,
    *,
    in_backward: bool = False,
) -> Tensor:
    """The weight to compute with, shape (out_features, in_features): the NF4 base with the trained columns.

    The arguments are those of :func:`dequantized_linear` and :func:`~paca_lightning.layers.nf4.dequantize_rows`.
    """
    weight = dequantize_rows(packed, scales, in_features, dtype, in_backward=in_backward)
    if delta is not None:
        weight.index_copy_(1, indices, trained_columns(columns, delta, scaling).to(dtype))
    return weight


class _DequantizedLinear(torch.autograd.Function):
    """Linear map with a frozen weight that exists only during its GEMM. It saves no activation."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        input: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        in_features: int,
        columns: Tensor,
        delta: Tensor | None,
        indices: Tensor,
        scaling: float | Tensor,
        *scales: Tensor,
    ) -> Tensor:
        weight = merged_weight(packed, scales, in_features, input.dtype, columns, delta, indices, scaling)
        # All of these are parameters and buffers of the layer, so saving them costs nothing.
        factors = [scaling] if isinstance(scaling, Tensor) else []
        ctx.save_for_backward(packed, columns, delta, indices, *scales, *factors)  # type: ignore[arg-type]
        ctx.in_features, ctx.scaling = in_features, None if factors else scaling  # type: ignore[attr-defined]
        return F.linear(input, weight, None if bias is None else bias.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        packed, columns, delta, indices, *scales = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            # torch.compile of torch 2.10 takes `scales` for a tuple, which has no pop.
            scales, scaling = (scales[:-1], scales[-1]) if ctx.scaling is None else (scales, ctx.scaling)
            settings = (columns, delta, indices, scaling)
            grad_input = grad_output @ merged_weight(
                packed, tuple(scales), ctx.in_features, grad_output.dtype, *settings, in_backward=True
            )
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_input, grad_bias, *[None] * (len(ctx.needs_input_grad) - 2)
