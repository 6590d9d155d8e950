"""Next-token cross-entropy from hidden states, without materializing the full logits.

Shapes: B sequences, T tokens each, N = B·T rows, D hidden features, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import trained_rows
from paca_lightning.core.private.torch import is_fake, version_of
from paca_lightning.tasks.chunked_loss import chunked_cross_entropy
from paca_lightning.tasks.data.batch import IGNORE_INDEX

MIN_CHUNK = 128


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    new_rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Summed cross-entropy of ``hidden @ weight.T + bias`` against labels, a chunk of rows at a time.

    fp32 and fp64 use ``torch.nn.functional.linear_cross_entropy`` where it exists (PyTorch 2.13). Half precision, older
    versions and heads of which some rows are trained use a chunked loop of ours: PyTorch 2.13 sums the loss of bf16
    hidden states in bf16, and knows no such rows.

    Args:
        hidden: Hidden states (N, D).
        weight: Weight of the head (V, D), trained or not.
        labels: Class of each row (N,), int64; -100 marks rows without a loss.
        bias: Bias of the head (V,).
        chunk_size: Rows of logits that exist at a time. Default: as many as take the memory of the hidden states, at
            least 128.
        new_rows: Rows of the weight that are trained apart from it (see ``core.new_tokens.trained_rows``).

    Returns:
        The sum as a scalar of at least fp32; 0 without any label.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        # Cast once: autocast does not cache the cast of a frozen weight, so each chunk would repeat it.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    else:
        hidden = hidden.to(weight.dtype)
    if hidden.device.type == "cpu" and not is_fake(hidden):
        # Drop rows without a loss. On other devices this would wait for the device; traced tensors have no values.
        trained = labels != IGNORE_INDEX
        hidden, labels = hidden[trained], labels[trained]
    if chunk_size is None:
        chunk_size = max(MIN_CHUNK, hidden.numel() // len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        wide = hidden.dtype in (torch.float32, torch.float64)
        if wide and new_rows is None and hasattr(nn, "LinearCrossEntropyOptions"):
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
            return F.linear_cross_entropy(
                hidden, weight, labels, linear_bias=bias, reduction="sum", ignore_index=IGNORE_INDEX, options=options
            )
        return chunked_cross_entropy(hidden, weight, labels, bias, chunk_size, new_rows)


class CausalLMLoss:
    """Next-token cross-entropy of a Hugging Face causal language model, computed inside the model's own forward.

    During the call, the forward of the output head returns the loss of its hidden states instead of their logits. The
    model and the head are still called as modules, so their hooks run (FSDP2 gathers parameters in them).

    Some models change their logits after the head (soft-capping, scaling), so they do not return what the head
    returned. The first call detects this; from then on, the loss is computed from the model's full logits. The same
    holds for a head that is not a plain ``nn.Linear``.

    Args:
        chunk_size: Rows of logits that exist at a time (see :func:`linear_cross_entropy`).

    Raises:
        PaCAError: If the chunk size is not positive.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise PaCAError(f"loss_chunk_size must be at least 1, not {chunk_size}.")
        self.chunk_size = chunk_size
        self.fused = True

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the trained tokens, and their number.

        Args:
            model: A causal language model with ``get_output_embeddings()`` and an output with ``logits``.
            inputs: Its inputs: ``input_ids`` (B, T) and the like.
            labels: Aligned with ``input_ids`` (B, T): the logits at t predict the label at t + 1.

        Returns:
            Two scalars on the model's device: the sum, at least fp32, and the number of tokens, int64.
        """
        targets = next_tokens(labels).flatten()
        (total,) = self.of_parts(model, inputs, [(slice(None), targets)])
        return total, (targets != IGNORE_INDEX).sum()

    def of_rows(self, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of each row's trained tokens, and their numbers: shape (B,) both, as for all rows."""
        targets = next_tokens(labels)
        parts = [(slice(row, row + 1), target) for row, target in enumerate(targets)]
        return torch.stack(self.of_parts(model, inputs, parts)), (targets != IGNORE_INDEX).sum(1)

    def of_parts(
        self, model: nn.Module, inputs: dict[str, Tensor], parts: Sequence[tuple[slice, Tensor]]
    ) -> list[Tensor]:
        """Summed cross-entropies of one forward.

        Args:
            model: As above.
            inputs: As above.
            parts: Rows of the batch, and the token that follows each of theirs, in one dimension, or -100.

        Returns:
            A scalar for each part.
        """
        if self.fused:
            totals = self._fused(model, inputs, parts)
            if totals is not None:
                return totals
            self.fused = False
        logits = model(**inputs, use_cache=False).logits

        def cross_entropy(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(rows.flatten(0, 1).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")

        return [cross_entropy(logits[rows], targets) for rows, targets in parts]

    def _fused(
        self, model: nn.Module, inputs: dict[str, Tensor], parts: Sequence[tuple[slice, Tensor]]
    ) -> list[Tensor] | None:
        """The sums computed in the head, or None if the head's output is not the model's."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        if type(head).forward is not nn.Linear.forward and trained_rows(head) is None:
            rank_zero_info(
                f"The output head is a {type(head).__name__}, not a plain nn.Linear: the loss needs full logits."
            )
            return None
        returned: list[tuple[Tensor, int]] = []

        # Gradients are computed in the forward: each part's for the whole head, if it is trained. They are recomputed.
        recomputed = len(parts) > 1 and head.weight.requires_grad and torch.is_grad_enabled()

        def losses_in_place_of_logits(hidden: Tensor) -> Tensor:
            def loss_of(rows: slice, targets: Tensor) -> Tensor:
                new = trained_rows(head)  # here, where FSDP2 has gathered them
                arguments = hidden[rows].flatten(0, 1), head.weight, targets, head.bias, self.chunk_size, new
                if recomputed:
                    return cast(Tensor, checkpoint(linear_cross_entropy, *arguments, use_reentrant=False))
                return linear_cross_entropy(*arguments)

            totals = torch.stack([loss_of(*part) for part in parts]).view(1, 1, -1)
            returned.append((totals, version_of(totals)))
            return totals

        with _forward_replaced(head, losses_in_place_of_logits):
            logits = model(**inputs, use_cache=False).logits
        if len(returned) == 1:
            totals, version = returned[0]
            if logits is totals and version_of(logits) == version:
                return list(totals.flatten())
        rank_zero_info(f"{type(model).__name__} changes its logits after the head: the loss needs full logits.")
        return None


def next_tokens(labels: Tensor) -> Tensor:
    """The label that follows each token (B, T); none follows the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a module's forward; its hooks still run."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of each row.

    Args:
        logits: Shape (B, T, V), of any dtype.
        labels: Shape (B, T), aligned with the inputs, -100 where not trained.

    Returns:
        The mean over the trained tokens of each row, 0 if it has none, shape (B,) fp32; and their number, shape (B,)
        int64.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    # Row by row, as each row's logits are cast to fp32.
    totals = [F.cross_entropy(row.float(), label, reduction="sum") for row, label in zip(logits, labels, strict=True)]
    tokens = (labels != IGNORE_INDEX).sum(1)
    return torch.stack(totals) / tokens.clamp(min=1), tokens
