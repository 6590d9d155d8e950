"""Batches as a causal language model takes them: a dictionary of tensors."""

from typing import Any

from torch import Tensor

from paca_lightning.core.tokens import IGNORE_INDEX as IGNORE_INDEX

TokenBatch = dict[str, Tensor]
"""``input_ids`` and ``labels`` (B, T), and where needed ``attention_mask`` or ``position_ids`` (B, T)."""

_BOUNDS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of packed documents


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model's forward takes: all but the labels."""
    names = ("input_ids", "attention_mask", "position_ids", *_BOUNDS)
    return {name: batch[name] for name in names if name in batch}


def one_row(batch: TokenBatch) -> TokenBatch:
    """Packed rows (B, T) as one packed row (1, B·T). The result is the same, as positions restart in each document.

    With flash attention, Hugging Face models keep attention inside documents for a batch of one row only; in a larger
    batch, documents would attend to each other.
    """
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
