"""Fixtures of the tests of tasks."""

from pathlib import Path
from typing import Any

import pytest

from paca_lightning.tasks.instruction import InstructionDataModule
from tests.tasks.rows import FIXTURES
from tests.tiny import tiny_model_directory, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def module(tokenizer_directory: str, tmp_path: Path) -> Any:
    """Builds a data module with its cache in the test's directory."""

    def build(train: Path | str = FIXTURES / "chat.jsonl", **settings: Any) -> InstructionDataModule:
        defaults = {"tokenizer": tokenizer_directory, "cache_dir": str(tmp_path / "cache")}
        return InstructionDataModule(train=str(train), **(defaults | settings))

    return build


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama and its tokenizer."""
    return str(tiny_model_directory(tmp_path_factory.mktemp("tiny") / "model"))
