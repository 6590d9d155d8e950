"""Llama's RMSNorm, and those of other models with the same code, when the weight is trained: its input alone is kept.

T tokens, H hidden size. A suffix names the dimensions of a tensor::

    y_TH = w_H * n_TH    n_TH = x_TH * i_T1, rounded to the input's dtype    i_T1 = 1 / sqrt(mean(x_TH ** 2) + eps)

transformers computes this in Python, and autograd then keeps x_TH in fp32, and n_TH for the gradient of w_H. Here x_TH
is kept as it came, with i_T1, and the backward computes the rest again, bitwise as autograd does, in fewer passes. So a
trained norm takes less memory than a frozen one that autograd differentiates, and no more time.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paca_lightning.core.private.transformers import is_llama_norm
from paca_lightning.layers.plain import inside_transform


def keep_input_alone(norm: nn.Module) -> None:
    """Let an RMSNorm keep its input alone for the backward, until :func:`keep_as_before`.

    Norms that compute something else stay as they are, and those whose forward somebody has replaced, such as a kernel.
    """
    if "forward" not in vars(norm) and is_llama_norm(norm):
        # A partial, because deepcopy follows its arguments: a copied norm computes with its own weight.
        norm.forward = functools.partial(_forward, norm)


def keep_as_before(norm: nn.Module) -> None:
    """Give a norm the forward of its class again, if :func:`keep_input_alone` has replaced it."""
    if getattr(vars(norm).get("forward"), "func", None) is _forward:
        del norm.forward


def _forward(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or inside_transform() or not torch.is_grad_enabled():
        output: Tensor = type(norm).forward(norm, hidden_states)
        return output
    return _RMSNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """The norm of ``input`` (..., H) with ``weight`` (H,); see the module."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = input.to(torch.float32)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(input, weight, inverse)
        return weight * (wide * inverse).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight, inverse = ctx.saved_tensors
        wide = input.to(torch.float32)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[1]:
            normalized = (wide * inverse).to(input.dtype)
            grad_weight = (grad_output * normalized).sum_to_size(weight.shape).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # In autograd's order of operations, so that nothing is rounded otherwise: d/dx of x * i(x).
            grad = (grad_output * weight).to(input.dtype).to(torch.float32)
            grad_inverse = (grad * wide).sum(-1, keepdim=True)
            grad_mean = -0.5 * grad_inverse * inverse.pow(3) / input.shape[-1]
            grad_input = (grad * inverse).add_(wide * (2 * grad_mean)).to(input.dtype)
        return grad_input, grad_weight, None
