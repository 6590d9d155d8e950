"""Rows of files of every kind, of several files, and of what is missing or broken."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.instruction import InstructionDataModule
from tests.tasks.rows import FIXTURES, GOOD, chat, read, write_rows


def test_files_are_told_apart_by_content_not_by_name(tmp_path: Path) -> None:
    expected = read(FIXTURES / "chat.jsonl")
    lines = (FIXTURES / "chat.jsonl").read_bytes()
    rows = [json.loads(line) for line in lines.splitlines()]
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "lines.txt").write_bytes(b"\n" + lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    for path in tmp_path.iterdir():
        first = 2 if path.name == "lines.txt" else 1  # the line's number
        assert read(path) == [(row + first - 1, turns) for row, turns in expected], path.name


def test_a_long_json_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paca_lightning.tasks.data.json_stream.CHUNK_BYTES", 7)  # boundaries fall everywhere
    rows = [{"text": "é🙂" * i, "n": i} for i in range(20)]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert list(Source(str(tmp_path / "list.json")).rows()) == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', r"a.jsonl, row 2: is not UTF-8 \(character 11 of the row\)"),
        ("a.json", b'[{"text": "ok"}, {"text": "\xff"}]', r"a.json, row 2: is not UTF-8"),
        ("a.json", b'[{"text": "ok"}, {"te', "a.json, row 2: is not valid JSON"),
        ("a.json", b'[{"text": "ok"} {"text": 1}]', r"a.json, row 2: is not valid JSON \(Expected ',', found '{'\)"),
        ("a.json", b'[{"text": "ok"}', "a.json, row 2: .*found 'the end of the file'"),
        ("a.jsonl", b"", "a.jsonl: has no rows"),
        ("a.json", b"[]", "a.json: has no rows"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
        ("a.parquet", b"PAR1, or so it says", "a.parquet: cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PaCAError, match=message):
        list(Source(str(tmp_path / name)).rows())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory of two shards of different formats, and a file that is none."""
    directory = tmp_path / "shards"
    directory.mkdir()
    rows = [chat("a", "b"), chat("c", "d")]
    pq.write_table(pa.Table.from_pylist(rows), directory / "train-00000-of-00002.parquet")
    write_rows(directory / "train-00001-of-00002.jsonl", [{"instruction": "e", "output": "f"}])
    (directory / "README.md").write_text("Two shards.")
    return directory


def test_a_directory_a_pattern_and_a_list_of_files_are_read_in_order(module: Any, shards: Path) -> None:
    first, second = (str(path) for path in sorted(shards.glob("train-*")))
    for train in (str(shards), str(shards / "train-*"), [first, second], [str(shards / "*.parquet"), second]):
        data = InstructionDataModule(**module().hparams | {"train": train})
        data.setup("fit")
        split = data.splits["train"]
        assert split.files() == [first, first, second]
        assert split.column("row").tolist() == [1, 2, 1]
        assert "2 files" in split.describe()


def test_rows_of_the_same_number_in_two_files_are_held_out_apart(module: Any, shards: Path) -> None:
    data = module(shards, validation_fraction=0.34)
    data.setup("fit")
    assert {name: len(split.dataset) for name, split in data.splits.items()} == {"train": 2, "validation": 1}


def test_a_bad_row_is_named_with_its_file(module: Any, shards: Path) -> None:
    write_rows(shards / "train-00001-of-00002.jsonl", [{"instruction": "e", "output": "f"}, {"instruction": "g"}])
    with pytest.raises(PaCAError, match=r"train-00001-of-00002.jsonl, row 2: the field 'output' is missing"):
        module(shards).prepare_data()


@pytest.mark.parametrize("settings", [{}, {"on_bad_row": "drop"}, {"streaming": True, "on_bad_row": "drop"}])
def test_all_bad_files_and_rows_of_a_directory_come_in_one_list(
    settings: dict[str, Any], module: Any, shards: Path
) -> None:
    write_rows(shards / "train-00001-of-00002.jsonl", [{"instruction": "e", "output": "f"}, {"instruction": "g"}])
    write_rows(shards / "a.jsonl", [{"unheard": "of"}, GOOD])
    (shards / "b.json").write_text("")
    (shards / "c.json.gz").write_bytes(gzip.compress(json.dumps([GOOD] * 99).encode())[:40])
    (shards / "d.json").write_text('[{"messages": [{"role": "user", "content": "a"}]}, {"mess')
    with pytest.raises(PaCAError) as caught:
        module(shards, **settings).prepare_data()
    first, *listed = str(caught.value).splitlines()
    assert "2 rows cannot be used and 4 files cannot be read to their end. Correct them." in first
    expected = (
        "a.jsonl, row 1: the fields 'unheard' fit",
        "b.json: has no rows",
        "c.json.gz: cannot be read",
        "d.json",
    )
    for line, start in zip(
        listed, (*expected, "d.json, row 2: is not", "train-00001-of-00002.jsonl, row 2"), strict=True
    ):
        assert line.startswith(f"  {shards / start}")


def test_files_that_do_not_belong_together_or_are_not_there_are_refused(module: Any, shards: Path) -> None:
    with pytest.raises(PaCAError, match=r"no file matches \(looked for .*shards/\*\.gz"):
        module(shards / "*.gz").prepare_data()
    write_rows(shards / "test.jsonl", [chat("a", "b")])
    with pytest.raises(
        PaCAError, match=r"several splits \(test, train\).*such as '.*/shards/\*train\*', or '.*test\.jsonl'"
    ):
        module(shards).prepare_data()
    with pytest.raises(PaCAError, match="the list of data files is empty"):
        InstructionDataModule(**module().hparams | {"train": []}).prepare_data()


def test_missing_sources_say_what_to_do(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PaCAError, match=r"nowhere.jsonl: no such file \(looked for /"):
        module("nowhere.jsonl").prepare_data()
    train = ["a.jsonl", {"location": "b.jsonl", "weight": 2}, "c/*.parquet", str(FIXTURES / "chat.jsonl")]
    data = InstructionDataModule(**module().hparams | {"train": train, "validation": "d.parquet"})
    with pytest.raises(PaCAError) as raised:
        data.prepare_data()
    first, *listed = str(raised.value).splitlines()
    assert first == "4 of the data's locations are not there:"
    for line, name in zip(
        listed, ("a.jsonl: no such file", "b.jsonl", "c/*.parquet: no file", "d.parquet"), strict=True
    ):
        assert line.startswith(f"  {name}")
    with pytest.raises(PaCAError, match=r"is a directory, but not one that `datasets` saved"):
        module(tmp_path).prepare_data()
    datasets.DatasetDict(test=datasets.Dataset.from_list([GOOD])).save_to_disk(tmp_path / "saved")
    with pytest.raises(PaCAError, match="has no split 'train'; it has 'test'"):
        module(tmp_path / "saved").prepare_data()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match=r"(?s)some/data: .*Offline, give a local file, or a directory .*save_to_disk"):
        module("some/data").prepare_data()
    with pytest.raises(PaCAError, match=r"tokenizer 'some/model': cannot be loaded .*give its directory"):
        module(tokenizer="some/model").prepare_data()
