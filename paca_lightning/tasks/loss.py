"""Cross-entropy of a causal language model from its hidden states, so that its full logits never exist.

Shapes: B sequences, T tokens each, N = B·T rows, D hidden features, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from paca_lightning.core.private.torch import is_fake
from paca_lightning.tasks.data.batch import IGNORE_INDEX

MIN_CHUNK = 128


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over chunks of rows, whose gradients are computed together with the loss.

    What is kept for the backward is the gradient of the hidden states, as large as they are, and that of the weight
    and bias if those are trained. Products are taken in the weight's dtype, softmax and sums in fp32 (fp64 for fp64).
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
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad[1] else None
        grad_bias = torch.zeros_like(cast(Tensor, bias), dtype=wide) if needs_grad[2] else None
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            trained = labels[rows] != IGNORE_INDEX
            targets = labels[rows].clamp(min=0).unsqueeze(1)
            logits = F.linear(hidden[rows], weight, bias).to(wide)
            log_normalizer = logits.logsumexp(1, keepdim=True)
            total += ((log_normalizer - logits.gather(1, targets)).squeeze(1) * trained).sum()
            if not any(needs_grad):
                continue
            # softmax(logits) - onehot(target), in place; rows that are not trained get no gradient
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
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Widened first, so that a mean over the tokens or a loss scale is not rounded to half precision.
        scaled = (
            None if grad is None else (grad.to(grad_outputs[0].dtype) * grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T + bias`` against labels, with a few rows of logits at a time.

    fp32 and fp64 go through PyTorch's own ``torch.nn.functional.linear_cross_entropy`` where it exists (2.13). Half
    precision, and older versions, go through a chunked loop of ours: PyTorch 2.13 adds up and returns the loss of
    bf16 hidden states in bf16, two or three digits of it.

    Args:
        hidden: Hidden states (N, D).
        weight: Weight of the head (V, D), trained or not.
        labels: Class of each row (N,), int64; -100 marks rows that are not trained.
        bias: Bias of the head (V,).
        chunk_size: Rows of logits that exist at a time. Default: as many as take the space of the hidden states,
            at least 128.

    Returns:
        The sum as a scalar of at least fp32. 0 if no row is trained.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # Once here: autocast does not cache the cast of a frozen weight, so each chunk would repeat it.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    else:
        hidden = hidden.to(weight.dtype)
    if hidden.device.type == "cpu" and not is_fake(hidden):
        # Rows that are not trained cost nothing. Elsewhere their number would have to be awaited, and tensors that are
        # traced have no values.
        trained = labels != IGNORE_INDEX
        hidden, labels = hidden[trained], labels[trained]
    if chunk_size is None:
        chunk_size = max(MIN_CHUNK, hidden.numel() // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype in (torch.float32, torch.float64) and hasattr(nn, "LinearCrossEntropyOptions"):
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
            return F.linear_cross_entropy(
                hidden, weight, labels, linear_bias=bias, reduction="sum", ignore_index=IGNORE_INDEX, options=options
            )
        return _chunked(hidden, weight, labels, bias, chunk_size)


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk_size: int) -> Tensor:
    grad = torch.is_grad_enabled()
    needs_grad = tuple(grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    return cast(Tensor, _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, chunk_size, needs_grad))


class CausalLMLoss:
    """Next-token cross-entropy of a Hugging Face causal language model, from the model's own forward.

    For the time of a call the output head computes the loss of the hidden states it is given, in place of their
    logits. The model and the head are still called as modules, so that hooks on either (FSDP2 gathers parameters in
    them) run as ever, and whatever the model does before its head is kept.

    A model that changes its logits after the head (soft-capping, scaling) returns something else than what its head
    returned. It is noticed in the first call; from then on the loss is taken from the model's own logits. So it is
    with a head that is not a plain ``nn.Linear``.

    Args:
        chunk_size: Rows of logits that exist at a time (see :func:`linear_cross_entropy`).
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        self.chunk_size = chunk_size
        self.fused = True

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies of all trained tokens, and their number.

        Args:
            model: A causal language model with ``get_output_embeddings()`` and an output with ``logits``.
            inputs: Its inputs: ``input_ids`` (B, T) and the like.
            labels: Aligned with ``input_ids`` (B, T): the logits at t are trained towards the label at t + 1.

        Returns:
            Two scalars on the model's device: the sum, at least fp32, and the number of tokens, int64.
        """
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        count = (targets != IGNORE_INDEX).sum()
        if self.fused:
            total = self._fused(model, inputs, targets)
            if total is not None:
                return total, count
            self.fused = False
        logits = model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"), count

    def _fused(self, model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor | None:
        """The sum computed in the head, or None where that is not the model's loss."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        if type(head).forward is not nn.Linear.forward:
            rank_zero_info(
                f"The output head is a {type(head).__name__}, not a plain nn.Linear: the loss needs full logits."
            )
            return None
        returned: list[tuple[Tensor, int]] = []

        def loss_in_place_of_logits(hidden: Tensor) -> Tensor:
            total = linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets, head.bias, self.chunk_size)
            total = total.view(1, 1, 1)
            returned.append((total, _version(total)))
            return total

        with _forward_replaced(head, loss_in_place_of_logits):
            logits = model(**inputs, use_cache=False).logits
        if len(returned) == 1:
            total, version = returned[0]
            if logits is total and _version(logits) == version:
                return total.view(())
        rank_zero_info(f"{type(model).__name__} changes its logits after the head: the loss needs full logits.")
        return None


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module's call, hooks included, run another forward for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's loss, by itself.

    Args:
        logits: Shape (B, T, V), of any dtype.
        labels: Shape (B, T), aligned with the inputs, -100 where not trained.

    Returns:
        The mean over the trained tokens of each row, 0 if it has none, shape (B,) fp32; and their number, shape (B,)
        int64.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    # One at a time, because the losses are taken of logits in fp32.
    totals = [F.cross_entropy(row.float(), label, reduction="sum") for row, label in zip(logits, labels, strict=True)]
    tokens = (labels != IGNORE_INDEX).sum(1)
    return torch.stack(totals) / tokens.clamp(min=1), tokens
