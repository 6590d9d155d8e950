"""The data command."""

import io
from pathlib import Path

import pytest
from lightning.pytorch import LightningDataModule
from rich.console import Console

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tools import data as data_tool
from tests.tasks.rows import FIXTURES
from tests.tiny import tiny_tokenizer


def test_the_data_tool_marks_trained_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    conversations = InstructionDataModule(
        str(tmp_path), str(FIXTURES / "chat.jsonl"), validation_fraction=0.34, cache_dir=str(tmp_path / "cache")
    )
    console = Console(record=True, width=100, file=io.StringIO())
    monkeypatch.setattr(data_tool, "Console", lambda: console)
    data_tool.data(conversations, samples=1)
    text = console.export_text()
    assert "<|im_start|>assistant\n⟦" in text
    assert "<|im_end|>⟧" in text
    assert "validation" in text
    assert "dropped, no answer left" in text
    with pytest.raises(PaCAError, match="the data here is LightningDataModule"):
        data_tool.data(LightningDataModule())
