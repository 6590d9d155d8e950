"""Batches of texts, and how a model takes them."""

import inspect
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

TextBatch = dict[str, Tensor]
"""``input_ids`` (B, T), where needed ``attention_mask`` and ``token_type_ids`` (B, T); and ``labels``."""

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def forward_arguments(model: PreTrainedModel, batch: TextBatch) -> dict[str, Any]:
    """What a model's forward takes of a batch, without a cache where it would have one."""
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
    kind: Any = type(model)
    if _has_cache(kind):
        inputs["use_cache"] = False
    return inputs


@cache
def _has_cache(kind: Any) -> bool:
    """Whether a forward would fill a cache. A signature is read once, not in every step."""
    return "use_cache" in inspect.signature(kind.forward).parameters
