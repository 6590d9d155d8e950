"""A Llama's forward written out block by block, with a place for each method's equations: no hooks, no wrappers."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

Change = Callable[[int, Tensor], Tensor]


def unchanged(layer: int, hidden: Tensor) -> Tensor:
    return hidden


def plain_logits(
    model: LlamaForCausalLM,
    ids: Tensor,
    *,
    after_attention: Change = unchanged,
    after_mlp: Change = unchanged,
    after_block: Change = unchanged,
) -> Tensor:
    """Logits (B, T, V) of token ids (B, T).

    Args:
        model: Its weights are used.
        ids: Token ids.
        after_attention: Given a layer's number and what its attention adds to the residual stream; its result is added.
        after_mlp: The same of the feed-forward layer.
        after_block: Given a layer's number and the residual stream behind it; its result goes on.
    """
    body = model.model
    hidden = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    rotary = body.rotary_emb(hidden, position_ids=positions)
    for number, block in enumerate(body.layers):
        attended = block.self_attn(block.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)[0]
        hidden = hidden + after_attention(number, attended)
        hidden = hidden + after_mlp(number, block.mlp(block.post_attention_layernorm(hidden)))
        hidden = after_block(number, hidden)
    return model.lm_head(body.norm(hidden))
