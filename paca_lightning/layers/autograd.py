"""The gradient tap: it makes a frozen linear layer train some of its input columns (arXiv 2503.01905).

T tokens, I in_features, O out_features, R rank. A suffix names the dimensions of a tensor::

    forward    x_TI --+---- GEMM with W_OI ---> y_TO ---> tap ---> y_TO, the same tensor
                      |                                    |
                      +---> x_TR = x_TI[:, indices] -------+  saved for backward: x_TR, nothing else of x_TI

    backward   dX_TI <----- GEMM with W_OI <--- dY_TO <--- tap <--- dY_TO, the same tensor
                                                           |
                                                           +---> dD_OR = scaling * dY_TO^T @ x_TR

W_OI has the trained columns: W_OI[:, indices] = C_OR + scaling * D_OR, for the base columns C and the delta D.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from paca_lightning.core.errors import PaCAError

HALF_DTYPES = (torch.float16, torch.bfloat16)

TRACES_ADDMM = torch.__version__ >= "2.13"
"""Whether PyTorch can compile and trace ``addmm`` with another dtype of the result."""


def scaling_argument(scaling: float | Tensor, like: Tensor) -> float | Tensor:
    """The scaling as an autograd function takes it.

    A tensor, one number for each column, is returned as it is. A float stays one, but while compiling it becomes a
    scalar tensor of fp32 or wider: where layers differ in their scaling, torch.compile makes it symbolic, and cannot
    pass a symbolic float to an autograd function (2.13).
    """
    if isinstance(scaling, Tensor) or not torch.compiler.is_compiling():
        return scaling
    return like.new_full((), scaling, dtype=torch.promote_types(like.dtype, torch.float32))


def column_product(grad_output: Tensor, selected: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """``scaling * grad_output.T @ selected``: the gradient of the delta. In fp16 it does not overflow.

    On CUDA it is one kernel: the GEMM scales its result, and writes fp32 from 16 bits without rounding to 16 bits.

    Args:
        grad_output: dY_TO, shape (tokens, out_features).
        selected: x_TR, shape (tokens, r), of the same dtype.
        dtype: Of the result.
        scaling: ``alpha / r``.

    Returns:
        Shape (out_features, r).
    """
    if grad_output.is_cuda and torch.version.hip is None:
        unread = grad_output.new_empty(1, dtype=dtype)  # with beta=0
        if dtype == torch.float32 and grad_output.dtype in HALF_DTYPES:
            if not TRACES_ADDMM:
                grad = torch.mm(grad_output.t(), selected, out_dtype=dtype)
                return grad if scaling == 1.0 else grad * scaling
            return torch.addmm(unread, grad_output.t(), selected, out_dtype=dtype, beta=0, alpha=scaling)
        if dtype == grad_output.dtype:
            return torch.addmm(unread, grad_output.t(), selected, beta=0, alpha=scaling)
    if dtype == torch.float32 and grad_output.dtype == torch.float16:
        grad = grad_output.t().float() @ selected.float()
    else:
        grad = (grad_output.t() @ selected).to(dtype)
    return grad if scaling == 1.0 else grad * scaling


def refuse_second_derivatives() -> None:
    """Refuse a tap's backward with ``create_graph=True``.

    The operator before the tap saw a constant weight, so second derivatives would miss the part of what is trained.

    Raises:
        PaCAError: If gradients are recorded, which only ``create_graph=True`` does in a backward.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise PaCAError(
            "A backward with create_graph=True reached a PaCA layer, which has first derivatives only. Pass the "
            "deltas to torch.func.functional_call, which makes them part of the graph, or freeze them."
        )


class _ColumnGradient(torch.autograd.Function):
    """Identity on a linear layer's output; its backward gives the delta the gradient of the selected columns."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, output: Tensor, input: Tensor, delta: Tensor, indices: Tensor, scaling: float | Tensor
    ) -> Tensor:
        selected = input.index_select(-1, indices).to(output.dtype)  # x_TR, in the precision that the layer computed in
        if isinstance(scaling, Tensor):
            ctx.save_for_backward(selected, scaling)
        else:
            ctx.save_for_backward(selected)
            ctx.scaling = scaling  # type: ignore[attr-defined]
        ctx.delta_dtype = delta.dtype  # type: ignore[attr-defined]
        # Returned as modified, the tensor itself can pass: that costs nothing, and unlike after a view, an in-place
        # activation may follow.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        refuse_second_derivatives()
        selected, *scale = ctx.saved_tensors
        grad = column_product(grad_output, selected, ctx.delta_dtype, 1.0 if scale else ctx.scaling)  # dD_OR
        if scale:
            grad = grad * scale[0]
        return grad_output, None, grad, None, None


def column_gradient(output: Tensor, input: Tensor, delta: Tensor, indices: Tensor, scaling: float | Tensor) -> Tensor:
    """Tap: pass a linear layer's output through, and give the delta its gradient.

    The gradient is ``scaling * grad_output.T @ input[..., indices]``: the paper's partial gradient times the scaling.
    Nothing else of the input is saved, and the gradient of the input is left to the linear layer itself.

    Args:
        output: y_TO, shape (tokens, out_features). It is returned itself, so it must be a fresh tensor: not a view,
            and used by no one else.
        input: x_TI, shape (tokens, in_features), what the layer computed it from.
        delta: D_OR, shape (out_features, r).
        indices: Selected input columns, shape (r,), int64.
        scaling: ``alpha / r``, or a number for each column, shape (r,).

    Returns:
        ``output`` with the tap in its graph.

    Raises:
        PaCAError: In a backward with ``create_graph=True``.
    """
    return _ColumnGradient.apply(output, input, delta, indices, scaling_argument(scaling, delta))


def tapped(
    linear: Callable[[Tensor], Tensor], input: Tensor, delta: Tensor, indices: Tensor, scaling: float | Tensor
) -> Tensor:
    """A linear map with the tap behind it, for an input of any number of dimensions.

    Args:
        linear: The map, from (tokens, in_features) to a fresh (tokens, out_features).
        input: Shape (..., in_features).
        delta: Shape (out_features, r).
        indices: Shape (r,), int64.
        scaling: As for :func:`column_gradient`.

    Returns:
        Shape (..., out_features).
    """
    # For a 3-D input with a bias, torch.nn.functional.linear returns a view, which the tap cannot pass through.
    flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    output = column_gradient(linear(flat), flat, delta, indices, scaling)
    return output if input.dim() == 2 else output.view(*input.shape[:-1], output.shape[-1])
