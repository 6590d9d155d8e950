"""A tiny model with new tokens, and the plain loop that trains them: the reference in tests of new tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from paca_lightning import add_new_tokens
from tests.plain_training import column_masks
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENS = ["<tool>", "</tool>", "<think>"]
VOCABULARY = len(tiny_tokenizer())
NEW = list(range(VOCABULARY, VOCABULARY + len(TOKENS)))
"""Their numbers."""

IDS = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
IDS[:, [2, 7]], IDS[1:, 9], IDS[3, 10] = NEW[0], NEW[1], NEW[2]  # the last one in one row alone


def with_new_tokens(
    tokens: list[str] = TOKENS, train: Any = "rows", **overrides: Any
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A tiny Llama that had to grow, unless ``vocab_size`` leaves spare rows, and its tokenizer."""
    model, tokenizer = tiny_llama(**({"vocab_size": VOCABULARY} | overrides)), tiny_tokenizer()
    add_new_tokens(model, tokenizer, tokens, train=train)
    return model, tokenizer


def masked_dense(model: nn.Module, converted: nn.Module) -> dict[str, Tensor]:
    """Masks of what a converted model trains, by name in its dense twin, of which all else is frozen."""
    masks = column_masks(model, converted)
    for name, parameter in model.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            masks[name] = torch.zeros_like(parameter)
            masks[name][NEW] = 1
        parameter.requires_grad_(name in masks)
    return masks


def plain_loss(model: Any) -> Tensor:
    """Mean loss of the next tokens in the model's own precision; Hugging Face's would round logits to fp32."""
    return F.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
