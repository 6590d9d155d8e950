"""Tiny random mixtures of experts, of the kinds in which transformers stacks experts."""

from typing import Any

import torch
import transformers as hf

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
ROUTED = {"num_experts": 4, "moe_intermediate_size": 24}
DEEPSEEK = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", ROUTED | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", ROUTED),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "sliding_window": 16}),
}
"""Names of classes without their endings, and settings."""


def moe_config(kind: str, **overrides: Any) -> Any:
    """Settings of a tiny model of one kind."""
    name, settings = MODELS[kind]
    return getattr(hf, f"{name}Config")(**(TEXT | settings | overrides))


def tiny_moe(kind: str, implementation: str = "grouped_mm", seed: int = 0, **overrides: Any) -> Any:
    """A tiny model with the same random fp32 weights for a seed, in train mode, whatever the global RNG did."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(hf, f"{MODELS[kind][0]}ForCausalLM")(moe_config(kind, **overrides)).train()
        for parameter in model.parameters():  # biases too, and gates that are not uniform
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation(implementation)
    return model


def tokens(seed: int = 0, rows: int = 2, length: int = 12) -> torch.Tensor:
    """Random tokens, shape (rows, length)."""
    return torch.randint(2, TEXT["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
