"""The model that most tests of memory trace."""

from pathlib import Path

import pytest
from transformers import LlamaConfig


@pytest.fixture
def model_directory(tmp_path: Path) -> str:
    """A Llama of 8 layers; weights are never written."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")
