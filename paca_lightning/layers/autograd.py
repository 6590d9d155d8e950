"""The gradient tap: what makes a frozen linear layer train some of its input columns."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def portable(scaling: float, like: Tensor) -> float | Tensor:
    """The scaling as a custom function takes it: a float, or a scalar tensor of at least fp32 while compiling.

    Where layers differ in their scaling, torch.compile makes it symbolic, and cannot hand a symbolic float to a custom
    function (2.13).
    """
    if not torch.compiler.is_compiling():
        return scaling
    return like.new_full((), scaling, dtype=torch.promote_types(like.dtype, torch.float32))


class _ColumnGradient(torch.autograd.Function):
    """Identity on a linear layer's output; its backward gives the delta the gradient of the selected columns."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, output: Tensor, input: Tensor, delta: Tensor, indices: Tensor, scaling: float | Tensor
    ) -> Tensor:
        # All that is kept of the input: r of its channels, in the precision in which the layer computed.
        selected = input.index_select(-1, indices).to(output.dtype)
        if isinstance(scaling, Tensor):
            ctx.save_for_backward(selected, scaling)
        else:
            ctx.save_for_backward(selected)
            ctx.scaling = scaling  # type: ignore[attr-defined]
        ctx.delta_dtype = delta.dtype  # type: ignore[attr-defined]
        # Returning the tensor itself as "modified" costs nothing and lets an in-place activation follow; a view of it
        # would forbid that.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        selected, *scale = ctx.saved_tensors
        grad = (grad_output.t() @ selected).to(ctx.delta_dtype)
        if scale:
            grad = grad * scale[0]
        elif ctx.scaling != 1.0:
            grad = grad * ctx.scaling
        return grad_output, None, grad, None, None


def column_gradient(output: Tensor, input: Tensor, delta: Tensor, indices: Tensor, scaling: float) -> Tensor:
    """Tap: pass a linear layer's output through and route its gradient to the delta.

    With ``output = input @ W.T`` and ``W[:, indices] = C + scaling * delta``, the gradient of the delta is
    ``scaling * grad_output.T @ input[..., indices]`` (the paper's partial gradient times the scaling). Nothing else of
    the input is saved, and the gradient of the input is left to the linear layer itself.

    Args:
        output: What the layer computed, shape (tokens, out_features). It is returned itself, so it must be a fresh
            tensor: neither a view nor needed by anyone else.
        input: What it computed it from, shape (tokens, in_features).
        delta: Trainable update of the columns, shape (out_features, r).
        indices: Selected input columns, shape (r,), int64.
        scaling: ``alpha / r``.

    Returns:
        ``output`` with the tap in its graph.
    """
    return _ColumnGradient.apply(output, input, delta, indices, portable(scaling, delta))


def tapped(linear: Callable[[Tensor], Tensor], input: Tensor, delta: Tensor, indices: Tensor, scaling: float) -> Tensor:
    """A linear map with the tap behind it, for an input of any number of dimensions.

    Args:
        linear: The map, from (tokens, in_features) to a fresh (tokens, out_features).
        input: Shape (..., in_features).
        delta: Shape (out_features, r).
        indices: Shape (r,), int64.
        scaling: ``alpha / r``.

    Returns:
        Shape (..., out_features).
    """
    # torch.nn.functional.linear returns a view for a 3-D input with a bias, which the tap could not pass through.
    flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    output = column_gradient(linear(flat), flat, delta, indices, scaling)
    return output if input.dim() == 2 else output.view(*input.shape[:-1], output.shape[-1])
