"""Shapes of well-known models, to measure and estimate them without their weights."""

from typing import Any

from transformers import LlamaConfig

from paca_lightning.core.errors import PaCAError

_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
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
"""Settings of ``LlamaConfig`` by name. In ``small``, a step is short and GEMMs still dominate it."""


def preset_config(name: str) -> LlamaConfig:
    """The Hugging Face configuration of a known shape.

    Raises:
        PaCAError: If there is no such preset.
    """
    if name not in PRESETS:
        raise PaCAError(f"There is no preset {name!r}. Choose one of {', '.join(PRESETS)}, or give a model.")
    return LlamaConfig(**PRESETS[name])
