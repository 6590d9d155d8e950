"""Summed cross-entropy a chunk of rows at a time, with gradients computed in the forward.

Shapes: N rows, D hidden features, V vocabulary.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from paca_lightning.core.tokens import IGNORE_INDEX


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy over chunks of rows; the forward computes the gradients too.

    Saved for backward: the gradient of the hidden states (N, D), and those of weight, bias and rows if trained. GEMMs
    run in the weight's dtype, softmax and sums in fp32 (fp64 for fp64).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        needs_grad: tuple[bool, bool, bool],
        trained_rows: Tensor | None,
        ids: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad[1] else None
        grad_bias = torch.zeros_like(cast(Tensor, bias), dtype=wide) if needs_grad[2] else None
        grad_rows = None if trained_rows is None else torch.zeros_like(trained_rows, dtype=wide)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            trained = labels[rows] != IGNORE_INDEX
            targets = labels[rows].clamp(min=0).unsqueeze(1)
            logits = F.linear(hidden[rows], weight, bias).to(wide)
            log_normalizer = logits.logsumexp(1, keepdim=True)
            total += ((log_normalizer - logits.gather(1, targets)).squeeze(1) * trained).sum()
            if not any(needs_grad) and grad_rows is None:
                continue
            # softmax(logits) - onehot(target), in place; zero for rows without a loss
            grad_logits = logits.sub_(log_normalizer).exp_()
            grad_logits.scatter_add_(1, targets, torch.full_like(log_normalizer, -1.0))
            grad_logits.mul_(trained.unsqueeze(1))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
            if grad_rows is not None:
                grad_rows += grad_logits.index_select(1, cast(Tensor, ids)).T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_rows)
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (hidden, weight, bias, trained_rows))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Multiply in fp32: a mean over tokens or a loss scale would be rounded in half precision.
        scaled = [
            None if grad is None else (grad.to(grad_outputs[0].dtype) * grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled[:3], None, None, None, scaled[3], None)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    trained_rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Summed cross-entropy, a scalar of at least fp32.

    Args:
        hidden: Hidden states (N, D).
        weight: Of the head (V, D).
        labels: Shape (N,).
        bias: Of the head (V,).
        chunk_size: Rows of logits that exist at a time.
        trained_rows: Rows of a frozen weight that are trained (n, D), and their numbers (n,). The weight holds their
            values. No gradient of the whole weight is made for theirs.
    """
    grad = torch.is_grad_enabled()
    needs_grad = tuple(grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    values, ids = trained_rows if trained_rows is not None and grad and trained_rows[0].requires_grad else (None, None)
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, chunk_size, needs_grad, values, ids))
