"""Files as people have them: encodings, compression, joined and pretty-printed JSON, and rows that are broken."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.records import Source
from tests.tasks.rows import GOOD, chat, write_rows

ROWS = [chat("é🙂?", "1"), chat("two?", "2")]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False)


def read(path: Path) -> list[tuple[int, Any]]:
    return list(Source(str(path)).rows())


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("text", [LINES, LIST, LINES + "\n\n  \n", LIST + "\n\n"], ids=["lines", "list", "end", "end2"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_unicode_encoding_is_read(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "rows").write_bytes(text.encode(encoding))
    assert read(tmp_path / "rows") == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("text", [LINES, LIST], ids=["lines", "list"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_every_compression_is_told_by_content(tmp_path: Path, compress: Any, text: str) -> None:
    (tmp_path / "rows").write_bytes(compress(text.encode()))
    assert read(tmp_path / "rows") == list(enumerate(ROWS, start=1))


def test_pretty_printed_and_joined_objects_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert read(path) == [(1, ROWS[0])]
    path.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    assert read(path) == list(enumerate(ROWS, start=1))
    path.write_text("".join(json.dumps(row) for row in ROWS))
    assert read(path) == list(enumerate(ROWS, start=1))
    path.write_text("\ufeff" + json.dumps(ROWS[0]) + "\n\ufeff" + json.dumps(ROWS[1]), encoding="utf-8")
    assert read(path) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LIST + "\n" + LIST, r"rows.json, row 3: is not valid JSON \(After the end of the list .* '\['"),
        (LIST + " the end", r"After the end of the list the file goes on with 't'"),
        (json.dumps({"data": ROWS}), "The field 'data' holds 2 objects: if these are the rows, save that"),
        (json.dumps({"version": 1, "data": ROWS}), "The field 'data' holds 2 objects"),
        (json.dumps({"instruction": {"0": "a"}, "output": {"0": "b"}}), "row 1: is one object with a column in each"),
        (json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}), "row 1: is one object with a column in each"),
        (LINES.replace("\n", ",\n"), r"row 2: is not valid JSON \(A comma precedes it"),
        ("prompt,completion\na,b\nc,d", r"row 1: is not valid JSON \(the file begins with 'prompt,completion'\)"),
        ("PK\3\4\0\0", "row 1: is not valid JSON .it is a zip archive, or a table of Excel"),
        (LINES + "\n" + "\0" * 99, "row 3: holds NUL bytes, as a crash or a full disk leaves them"),
        ("[" * 100_000, "row 1: is nested too deeply"),
        ('{"messages": ' + "[" * 100_000, "row 1: is nested too deeply"),
        ('{"messages": [\n{"a": 1}', "row 1: is not valid JSON"),
    ],
)
def test_what_is_not_rows_is_named_with_its_cause(module: Any, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content, encoding="utf-8")
    with pytest.raises(PaCAError, match=message):
        module(tmp_path / "rows.json").prepare_data()


def test_a_utf_16_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(LIST.encode("utf-16")[:-7])
    with pytest.raises(PaCAError, match=r"rows.json.*: is not (valid JSON|UTF-16)"):
        read(tmp_path / "rows.json")


def test_all_bad_rows_come_in_one_list_or_are_dropped(module: Any, tmp_path: Path) -> None:
    rows = [GOOD, "not JSON", chat("a", ""), {"messages": [], "id": 1}, GOOD, [1]]
    path = write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(PaCAError) as raised:
        module(path).prepare_data()
    first, *listed = str(raised.value).splitlines()
    assert first.endswith("4 rows cannot be used. Correct them, or set on_bad_row: drop to leave them out.")
    assert [line.split("row ")[1].split(":")[0] for line in listed] == ["2", "3", "4", "6"]
    for _ in range(2):  # the second time from the cache
        data = module(path, on_bad_row="drop")
        data.setup("fit")
        split = data.splits["train"]
        assert list(split.column("row")) == [1, 5]
        assert len(split.report.bad_rows) == 4
        assert split.dropped == 0
        assert "4 bad rows dropped, the first: " in split.report.describe_unused()[0]
        assert len(data.train_dataloader()) == 1


def test_a_long_list_of_bad_rows_is_cut_and_counted(module: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [GOOD, *[chat("a", "")] * 30])
    with pytest.raises(PaCAError) as raised:
        module(path).prepare_data()
    assert "30 rows cannot be used" in str(raised.value)
    assert str(raised.value).count("turn 2 is empty") == 20
    assert str(raised.value).endswith("and 10 more")


def test_rows_that_the_template_refuses_are_in_the_list(module: Any, tmp_path: Path) -> None:
    refuses = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    path = write_rows(tmp_path / "train.jsonl", [GOOD, chat("a", "b", "c", "d"), chat("a", "b", "c", "e")])
    tokenizer = module().prepare_data() or module()
    tokenizer.setup("fit")
    template = refuses + tokenizer.tokenizer.chat_template
    with pytest.raises(PaCAError, match=r"(?s)2 rows cannot be used.*row 2: .*too long.*row 3: .*too long"):
        module(path, chat_template=template).prepare_data()


def test_if_every_row_is_bad_there_is_nothing_to_train(module: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [chat("a", ""), chat("b", "")])
    with pytest.raises(PaCAError, match="2 rows cannot be used"):
        module(path, on_bad_row="drop").prepare_data()


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:2]", [1, 2]),
        ("[1:]", [2, 3, 4]),
        ("train[1:3]", [2, 3]),
        ("train", [1, 2, 3, 4]),
        ("train[:25%]", [1]),
        ("[50%:]", [3, 4]),
        ("train[25%:75%]", [2, 3]),
        ("train[-1:]", [4]),
    ],
)
def test_a_slice_takes_rows_of_local_files(module: Any, tmp_path: Path, split: str, expected: list[int]) -> None:
    rows = [chat(f"{i}?", str(i)) for i in range(4)]
    whole = write_rows(tmp_path / "all.jsonl", rows)
    parts = [str(write_rows(tmp_path / name, part)) for name, part in (("a.jsonl", rows[:2]), ("b.jsonl", rows[2:]))]
    data = module(whole, train_split=split)
    data.setup("fit")
    assert list(data.splits["train"].column("row")) == expected
    two_files = module(train=parts[0], train_split=split)
    two_files.hparams["train"] = parts
    two_files.setup("fit")
    found = two_files.splits["train"]
    assert [2 * int(file) + int(row) for file, row in zip(found.column("file"), found.column("row"), strict=True)] == (
        expected
    )


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[:50%:2]", r"split 'train\[:50%:2\]' cannot be used: give .* whole numbers"),
        ("train[:101%]", r"split 'train\[:101%\]' cannot be used"),
        ("train[:50%9]", r"split 'train\[:50%9\]' cannot be used"),
        ("train[9:]", "has no rows from 9"),
    ],
)
def test_a_split_that_files_do_not_have_is_refused(module: Any, tmp_path: Path, split: str, message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        module(write_rows(tmp_path / "train.jsonl", [GOOD, GOOD]), train_split=split).prepare_data()


def test_the_name_of_a_split_has_no_effect_on_files_and_says_so(
    module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        module(write_rows(tmp_path / "train.jsonl", [GOOD, GOOD]), train_split="validation").prepare_data()
    assert "train_split 'validation' names no split, as the data are files" in caplog.text
    assert "train: 2 conversations" in caplog.text


def test_a_directory_says_what_it_skips(module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "rows"
    (directory / "more").mkdir(parents=True)
    write_rows(directory / "a.jsonl", [GOOD])
    (directory / "b.csv").write_text("a,b")
    (directory / "c.JSONL.ZST").write_bytes(zstd(json.dumps(GOOD).encode()))
    with caplog.at_level("INFO"):
        module(directory).prepare_data()
    assert "its JSON and Parquet files are read, but not the other entries (b.csv, more/)." in caplog.text
    assert "train: 2 conversations" in caplog.text
    (directory / "a.jsonl").unlink()
    (directory / "c.JSONL.ZST").unlink()
    with pytest.raises(PaCAError, match=r"holds no data files \(b.csv, more/\)"):
        module(directory).prepare_data()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("https://example.org/rows.jsonl", "is a URL, which is not read. Download the file"),
        ("s3://bucket/rows.jsonl", "is a URL, which is not read"),
    ],
)
def test_a_url_is_refused_as_one(module: Any, location: str, message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        module(location).prepare_data()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", '\ufeffprompt,completion\n"say ""hi""\nnow",7\n'),
        ("rows.TSV", "prompt\tcompletion\nx, y\t7\n"),
    ],
)
def test_a_table_is_refused_with_the_way_to_convert_it(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PaCAError, match=rf"{name}: is a table") as raised:
        module(tmp_path / name).prepare_data()
    monkeypatch.chdir(tmp_path)
    eval(str(raised.value).split("`")[1], {"pandas": pandas})
    turns = read(Path("rows.jsonl"))[0][1]
    assert turns["prompt"] in ('say "hi"\nnow', "x, y")
    assert turns["completion"] == "7"


NODES = [
    {"message_id": "1", "parent_id": None, "message_tree_id": "1", "role": "prompter", "text": "x"},
    {"message_id": "3", "parent_id": None, "message_tree_id": "3", "role": "prompter", "text": "y"},
    {"message_id": "2", "parent_id": "1", "message_tree_id": "1", "role": "assistant", "text": "z"},
    {"message_id": "4", "parent_id": "3", "message_tree_id": "3", "role": "assistant", "text": "w"},
]


def test_messages_of_trees_may_be_in_any_order_and_trees_may_be_nested(module: Any, tmp_path: Path) -> None:
    data = module(write_rows(tmp_path / "shuffled.jsonl", NODES))
    data.setup("fit")
    assert list(data.splits["train"].column("row")) == [1, 2]
    trees = [{**NODES[i], "replies": [{**NODES[i + 2], "replies": []}]} for i in (0, 1)]
    for tree in trees:
        del tree["message_tree_id"]
    nested = module(write_rows(tmp_path / "nested.jsonl", trees))
    nested.setup("fit")
    dataset = data.splits["train"].dataset
    assert nested.splits["train"].dataset["input_ids"][:] == dataset["input_ids"][:]


@pytest.mark.parametrize("inside", ["messages", "content"])
def test_a_key_that_is_there_twice_is_named(tmp_path: Path, inside: str) -> None:
    """Python's reader takes the last of them in silence."""
    line = json.dumps(ROWS[0]).replace(f'"{inside}":', f'"{inside}": "lost", "{inside}":', 1)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{line}\n{json.dumps(ROWS[1])}\n")
    (_, error), second = Source(str(path)).read()
    assert str(error) == f"has the key '{inside}' more than once in one object. Which value is meant?"
    assert second == (2, ROWS[1])
    path.write_text(f"[{json.dumps(ROWS[1])}, {line}]")
    with pytest.raises(PaCAError, match=f"row 2: has the key '{inside}' more than once"):
        read(path)
