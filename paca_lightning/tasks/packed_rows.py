"""How a model is told the documents of packed rows."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from paca_lightning.core.private.transformers import attention_of
from paca_lightning.tasks.data.batch import TokenBatch, one_row

_MASK_ARGUMENTS = inspect.signature(create_masks_for_generate).parameters.keys()


def by_positions(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """Positions restart in each document. transformers derives the attention within documents from them."""
    # With flash attention it does so for a batch of one row only.
    return one_row(batch) if attention_of(model.config).startswith("flash") else batch


def by_masks(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """As well as positions, the attention masks that the model would make from them if it looked (GPT-OSS, OPT)."""
    ids = batch["input_ids"]
    # Only the shape, the dtype and the device of the embeddings count.
    embeddings = torch.empty(1, dtype=model.dtype, device=ids.device).expand(*ids.shape, 1)
    arguments: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": embeddings,
        "attention_mask": None,
        "cache": None,
        "position_ids": batch["position_ids"],
        # What earlier releases of transformers call these, or ask for too.
        "past_key_values": None,
        "input_embeds": embeddings,
        "cache_position": torch.arange(ids.shape[1], device=ids.device),
    }
    masks = create_masks_for_generate(**{name: arguments[name] for name in _MASK_ARGUMENTS & arguments.keys()})
    return {**batch, "attention_mask": masks}


def by_boundaries(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """As well as positions, one row with the bounds of its documents, for kernels of convolutions and recurrences.

    On a GPU it waits for the device once: these kernels take the longest document as a number.
    """
    batch = one_row(batch)
    restarts = F.pad(batch["position_ids"].diff(dim=1) != 1, (1, 0), value=True)
    starts = restarts[0].nonzero().flatten().to(torch.int32)
    bounds = F.pad(starts, (0, 1), value=restarts.shape[1])
    longest = int(bounds.diff().max())
    return {
        **batch,
        "seq_idx": (restarts.cumsum(1) - 1).to(torch.int32),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


WAYS: dict[str, Callable[[PreTrainedModel, TokenBatch], dict[str, Any]]] = {
    "position_ids": by_positions,
    "attention masks": by_masks,
    "document bounds (seq_idx, cu_seq_lens)": by_boundaries,
}
"""Ways to tell a model the documents of packed rows. Each makes a batch (B, T) with ``position_ids`` into what the
model takes; rows may become one row of B·T."""


class PackedRows:
    """Makes batches into what a model takes. Packed rows go as ``way`` says, one of ``WAYS``."""

    def __init__(self) -> None:
        self.way = next(iter(WAYS))
        self.tried = False
        """Whether the way was tried on the model."""

    def __call__(self, model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
        """A batch for a model; its rows may have become one."""
        return WAYS[self.way](model, batch) if "position_ids" in batch else batch
