"""Batches of texts, and how a model takes them."""

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

TextBatch = dict[str, Tensor]
"""``input_ids`` (B, T), where needed ``attention_mask`` and ``token_type_ids`` (B, T); and ``labels``."""

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def forward_arguments(model: PreTrainedModel, batch: TextBatch) -> dict[str, Any]:
    """What a model's forward takes of a batch, without a cache where it would have one."""
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs
