"""Tokens of a batch of a language model: which have no loss, and how many are not padding."""

from collections.abc import Mapping

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token without a loss."""


def count_tokens(batch: Mapping[str, Tensor]) -> Tensor | int:
    """Number of tokens of a batch that are not padding, without waiting for the device.

    Args:
        batch: ``input_ids`` (B, T) and what marks the padding: ``attention_mask`` (B, T), or for packed rows
            ``position_ids`` and ``labels`` (B, T), where the padding is a last document without trained tokens.
    """
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        return mask.sum()
    if positions is None or positions.shape != ids.shape or "labels" not in batch:
        return ids.numel()
    columns = torch.arange(ids.shape[1], device=ids.device)
    starts = torch.where(positions == 0, columns, 0).amax(1, keepdim=True)  # (B, 1), of each row's last document
    filled = ((batch["labels"] != IGNORE_INDEX) & (columns >= starts)).any(1, keepdim=True)
    return torch.where(filled, ids.shape[1], starts).sum()
