"""The data command."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule
from rich.console import Console

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks import ClassificationDataModule, EmbeddingDataModule
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tools import data as data_tool
from tests.tasks.rows import FIXTURES, GOOD, chat, write_rows
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
    with pytest.raises(PaCAError, match="config's data is LightningDataModule"):
        data_tool.data(LightningDataModule())


def test_the_data_tool_shows_what_became_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    rows = [{**GOOD, "id": 1}, chat("a", "<think>b</think>c"), chat("a", "")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    conversations = InstructionDataModule(
        str(tmp_path), str(path), chat_template=template, on_bad_row="drop", cache_dir=str(tmp_path / "cache")
    )
    console = Console(record=True, width=200, file=io.StringIO())
    monkeypatch.setattr(data_tool, "Console", lambda: console)
    with pytest.warns(UserWarning, match="leaves out the text of an answer"):
        data_tool.data(conversations, samples=2)
    text = " ".join(console.export_text().split())
    for expected in (
        "formats │ chat",
        "rows │ 2",
        "bad rows dropped │ 1",
        "train: 1 bad rows dropped, the first: ",
        "row 3: the assistant's turn 2 is empty",
        "train: Fields not used, and in how many conversations: id (1).",
        "train: In 1 conversations, the chat template leaves out the text of an answer, or part of it. The first,",
    ):
        assert expected in text


def test_any_file_is_shown_on_one_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    turns = [message for _ in range(9) for message in chat("Why?\n" * 90, "So.\n" * 90)["messages"]]
    write_rows(tmp_path / "long.jsonl", [{"messages": turns, "id": 7}, GOOD, chat("a", "")])
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("datasets.disable_progress_bars", lambda: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = [str(tmp_path / "long.jsonl"), "--model", str(tmp_path / "model"), "--max_length", "20000"]
    with pytest.raises(PaCAError, match="row 3: the assistant's turn 2 is empty"):
        data_tool.main(arguments)
    data_tool.main([*arguments, "--on_bad_row", "drop"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40
    assert max(map(len, printed.splitlines())) <= 100
    for expected in ("trained tokens", "id (1)", "1 bad rows dropped", "⟦So.↵", "… and ", "Chat template: no remarks"):
        assert expected in printed
    data_tool.main([*arguments, "--on_bad_row", "drop", "--full"])
    assert capsys.readouterr().out.count("⟦So.\n") == 9


LABELLED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "sequence": (
        [{"text": "Ice is wet.", "label": "yes"}, {"text": "A dog.", "label": "no"}, {"text": "No.", "label": "no"}],
        ["Ice is wet.", "label: yes", "label 'no' | 2", "items with a loss | 3"],
    ),
    "multi_label": (
        [{"text": "Ice is wet.", "labels": ["cold", "wet"]}, {"text": "A dog.", "labels": []}],
        ["label: cold, wet", "label: none", "label 'cold' | 1"],
    ),
    "tokens": (
        [{"tokens": ["Ice", "is", "wet"], "ner_tags": ["thing", "other", "other"]}],
        ["⟦", "label: thing, other, other", "label 'other' | 2", "items with a loss | 3"],
    ),
    "regression": (
        [{"text": "Ice is wet.", "label": 0.5}, {"text": "A dog.", "label": -2}],
        ["label: 0.5", "smallest and largest label | -2, 0.5"],
    ),
}


@pytest.mark.parametrize("task", LABELLED)
def test_the_data_tool_shows_texts_with_their_labels(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    monkeypatch.setattr(data_tool, "Console", lambda: console)
    tiny_tokenizer().save_pretrained(tmp_path)
    rows, expected = LABELLED[task]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data_tool.data(ClassificationDataModule(str(tmp_path), str(path), task=task, batch_size=1))
    shown = re.sub(r" *│ *", " | ", console.export_text())
    for text in [*expected, f"batches in an epoch | {len(rows)}", "training row 1:"]:
        assert text in shown


def test_the_data_tool_shows_the_texts_of_an_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    monkeypatch.setattr(data_tool, "Console", lambda: console)
    tiny_tokenizer().save_pretrained(tmp_path)
    row = {"anchor": "Is ice wet?", "positive": "Ice is wet.", "negative": "A dog barks."}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    data_tool.data(EmbeddingDataModule(str(tmp_path), str(path)))
    shown = console.export_text()
    for name, text in row.items():
        assert f"row 1, {name}:" in shown
        assert text in shown
    assert "anchor, positive, negative" in shown


def test_the_data_tool_names_an_option_that_it_does_not_have() -> None:
    with pytest.raises(PaCAError, match="unrecognized arguments: --sampels 3"):
        data_tool.main(["rows.jsonl", "--model", "m", "--sampels", "3"])


def test_the_data_tool_shows_both_answers_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    monkeypatch.setattr(data_tool, "Console", lambda: console)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Is ice wet?", "chosen": "No.", "rejected": "A dog."}])
    data_tool.main([str(path), "--model", str(tmp_path), "--preferences"])
    shown = console.export_text()
    assert "row 1, chosen:" in shown
    assert "row 1, rejected:" in shown
    assert "⟦No.<|im_end|>⟧" in shown
    assert "⟦A dog.<|im_end|>⟧" in shown
    assert "prompt_completion (pairs)" in shown
