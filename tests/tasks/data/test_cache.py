"""The cache of tokenized data: what its key depends on, damage, and runs that share it."""

import datetime
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import datasets
import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data import tokenization
from paca_lightning.tasks.data.cache import cached_files
from tests.tasks.rows import chat, write_rows
from tests.tiny import tiny_tokenizer

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(7)]


def entries(cache: Path) -> set[str]:
    return {entry.name for entry in (cache / "paca_lightning").iterdir() if entry.is_dir()}


def tokens(data: Any) -> list[dict[str, Any]]:
    data.setup("fit")
    return list(data.splits["train"].dataset)


def test_a_copy_of_a_file_is_not_tokenized_again_but_named_as_itself(module: Any, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", [*ROWS, chat("no answer", "")])
    second = tmp_path / "elsewhere.jsonl"
    shutil.copyfile(first, second)
    assert tokens(module(first, on_bad_row="drop")) == tokens(module(second, on_bad_row="drop"))
    assert len(entries(tmp_path / "cache")) == 1
    with pytest.raises(PaCAError, match=r"elsewhere.jsonl, row 8: the assistant's turn 2 is empty"):
        module(second).prepare_data()


def test_a_changed_file_of_the_same_size_and_time_is_tokenized_again(module: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", ROWS)
    before = tokens(module(path))
    text = path.read_text(encoding="utf-8").replace("answer 3", "answer 9")
    (tmp_path / "changed.jsonl").write_text(text, encoding="utf-8")
    assert tokens(module(tmp_path / "changed.jsonl")) != before
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 256},
        {"loss_on": "all"},
        {"format": "chat"},
        {"train_split": "train[:3]"},
        {"tree_paths": "all"},
        {"chat_template": "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"},
    ],
)
def test_settings_that_change_the_tokens_have_an_entry_of_their_own(
    module: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = write_rows(tmp_path / "train.jsonl", ROWS)
    module(path).prepare_data()
    module(path, batch_size=2, packing=True, num_proc=1, seed=3).prepare_data()
    assert len(entries(tmp_path / "cache")) == 1
    module(path, **settings).prepare_data()
    assert len(entries(tmp_path / "cache")) == 2


def test_another_tokenizer_has_an_entry_of_its_own(module: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", ROWS)
    module(path).prepare_data()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["question"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    module(path, tokenizer=str(tmp_path / "tokenizer")).prepare_data()
    assert len(entries(tmp_path / "cache")) == 2


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def _break_manifest(file: Path) -> None:
    (file.parent / "manifest.json").write_text("[]", encoding="utf-8")


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink, _break_manifest])
def test_a_damaged_entry_is_written_again(module: Any, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    path = write_rows(tmp_path / "train.jsonl", ROWS)
    before = tokens(module(path))
    (name,) = entries(tmp_path / "cache")
    damage(tmp_path / "cache" / "paca_lightning" / name / "documents.arrow")
    with pytest.warns(UserWarning, match=r"cached data in .* are damaged \(.*\), and are prepared again"):
        after = tokens(module(path))
    assert after == before


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "cache" / ".key-0123"
    left.mkdir(parents=True)
    (left / "documents.arrow").write_bytes(b"half")
    files = cached_files(tmp_path / "cache", "key", lambda directory: (directory / "a").write_text("whole") and None)
    assert [file.read_text() for file in files] == ["whole"]
    assert not left.exists()


def test_a_failed_preparation_leaves_nothing_behind(module: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [*ROWS])
    with pytest.raises(PaCAError, match="has no rows from 99 on"):
        module(path, train_split="train[99:]").prepare_data()
    assert not entries(tmp_path / "cache")


def test_of_two_runs_one_writes_the_entry_and_the_other_waits(tmp_path: Path) -> None:
    begun, go_on, built = Event(), Event(), []

    def build(directory: Path) -> None:
        begun.set()
        go_on.wait(60)
        built.append(directory)
        (directory / "file").write_text("content")

    runs = [Thread(target=cached_files, args=(tmp_path, "key", build)) for _ in range(2)]
    runs[0].start()
    assert begun.wait(60)
    runs[1].start()
    go_on.set()
    for run in runs:
        run.join(60)
    assert len(built) == 1
    assert json.loads((tmp_path / "key" / "manifest.json").read_text())["file"][0] == len("content")


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_read(module: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(PaCAError, match=r"cache_dir: .* cannot be written"):
        module("nowhere.jsonl", cache_dir=str(tmp_path / "file" / "cache")).prepare_data()
    with pytest.raises(PaCAError, match="cache_dir: 's3://bucket/cache' is a URL, but must be a directory"):
        module("nowhere.jsonl", cache_dir="s3://bucket/cache").prepare_data()


@pytest.mark.distributed
@pytest.mark.parametrize("num_proc", [2, 3])
def test_several_processes_give_the_documents_of_one_in_their_order(module: Any, tmp_path: Path, num_proc: int) -> None:
    rows = [*ROWS[:3], {"messages": []}, *ROWS[3:]]
    path = write_rows(tmp_path / "train.jsonl", rows)
    alone = module(path, on_bad_row="drop", num_proc=1)
    shared = module(path, on_bad_row="drop", num_proc=num_proc, cache_dir=str(tmp_path / "other"))
    assert tokens(shared) == tokens(alone)
    assert shared.splits["train"].report == alone.splits["train"].report
    files = list((tmp_path / "other").rglob("*.arrow"))
    assert len(files) == num_proc


def test_processes_are_as_many_as_the_rows_are_worth(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    plain = datasets.Dataset.map

    def spied(self: Any, *args: Any, num_proc: int | None = None, **settings: Any) -> Any:
        asked.append(num_proc)
        return plain(self, *args, **settings)

    monkeypatch.setattr(datasets.Dataset, "map", spied)
    monkeypatch.setattr(tokenization, "_cores", lambda: 4)
    path = write_rows(tmp_path / "train.jsonl", ROWS)
    module(path).prepare_data()
    monkeypatch.setattr(tokenization, "_RECORDS_PER_PROCESS", 3)
    module(path, max_length=100).prepare_data()
    module(path, max_length=101, num_proc=99).prepare_data()
    assert asked == [None, 2, 7]


def test_values_without_a_type_in_json_are_refused_by_their_name(module: Any, tmp_path: Path) -> None:
    rows = [{"prompt": datetime.date(2024, 1, 2), "completion": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(PaCAError, match="'prompt' is a date, expected a string"):
        module(tmp_path / "rows.parquet").prepare_data()


def test_the_garbage_collector_rests_while_rows_are_tokenized_and_no_longer(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, encode = [], tokenization.DocumentEncoder.__call__

    def watched(self: Any, records: Any) -> Any:
        seen.append(gc.isenabled())
        return encode(self, records)

    monkeypatch.setattr(tokenization.DocumentEncoder, "__call__", watched)
    module(write_rows(tmp_path / "train.jsonl", ROWS)).prepare_data()
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_stop_is_not_hidden_by_what_datasets_does_after_it(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        try:
            raise stop
        finally:
            raise TimeoutError  # as `datasets` does, waiting for its processes

    monkeypatch.setattr(datasets.Dataset, "map", stopped)
    with pytest.raises(stop):
        module(write_rows(tmp_path / "train.jsonl", ROWS)).prepare_data()
    assert entries(tmp_path / "cache") == set()
