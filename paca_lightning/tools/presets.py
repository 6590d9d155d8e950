"""Shapes of well-known models, to measure and estimate them without their weights."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from paca_lightning.core.errors import PaCAError

_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

_SMALL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}

PRESETS: dict[str, dict[str, Any]] = {
    "small": _SMALL | {"model_type": "llama", "intermediate_size": 2816},
    "small-moe": _SMALL
    | {"model_type": "mixtral", "intermediate_size": 1408, "num_local_experts": 8, "num_experts_per_tok": 2},
    "llama3-8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 8192,
    },
    "llama3.1-70b": _LLAMA3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "max_position_embeddings": 131072,
    },
}
"""Settings of a Hugging Face configuration by name.

In ``small``, a step is short and GEMMs still dominate it. In ``small-moe``, a token's two experts of eight are together
as wide as the MLP of ``small``.
"""


def preset_config(name: str) -> PretrainedConfig:
    """The Hugging Face configuration of a known shape.

    Raises:
        PaCAError: If there is no such preset.
    """
    if name not in PRESETS:
        raise PaCAError(f"There is no preset {name!r}. Choose one of {', '.join(PRESETS)}, or give a model.")
    return AutoConfig.for_model(**PRESETS[name])
