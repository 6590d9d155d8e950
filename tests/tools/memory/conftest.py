"""The model that most tests of memory trace."""

from pathlib import Path

import pytest
from transformers import LlamaConfig


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 8 layers; weights are never written."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    directory: Path = tmp_path_factory.mktemp("model")
    config.save_pretrained(directory)
    return str(directory)
