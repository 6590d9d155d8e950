"""Batches as a causal language model takes them: a dictionary of tensors."""

from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token without a loss."""

TokenBatch = dict[str, Tensor]
"""``input_ids`` and ``labels`` (B, T), and where needed ``attention_mask`` or ``position_ids`` (B, T)."""


def model_inputs(batch: TokenBatch) -> TokenBatch:
    """What of a batch the model's forward takes: all but the labels."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def one_row(batch: TokenBatch) -> TokenBatch:
    """Packed rows (B, T) as one packed row (1, B·T). The result is the same, as positions restart in each document.

    With flash attention, Hugging Face models keep attention inside documents for a batch of one row only; in a larger
    batch, documents would attend to each other.
    """
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
