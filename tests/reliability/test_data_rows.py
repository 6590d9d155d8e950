"""Data rows and files that are wrong in any way: used, or refused with their place and the cause; never a hang."""

import bz2
import copy
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import ChatEncoder
from paca_lightning.tasks.data.documents import DocumentEncoder
from paca_lightning.tasks.data.formats import Format, records
from paca_lightning.tasks.data.records import WHOLE_FILE, Source
from paca_lightning.tasks.mmlu.questions import check_question
from paca_lightning.tasks.mmlu.sources import read_file
from tests.reliability.examples import examples
from tests.tasks.rows import converted as rows_converted
from tests.tiny import tiny_tokenizer

FORMATS = get_args(Format)
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}
VALID: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi", "train": 0}, {"role": "assistant", "content": "yes", "weight": 1}]},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "s"}]},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "r"},
            {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "yes"},
        ],
        "tools": [{"name": "f", "parameters": {}}],
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "s"},
    {"instruction": "hi", "input": "", "output": "yes", "history": [["a", "b"]]},
    {"prompt": "hi", "completion": "yes"},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yes"}]},
    {"text": "### Human: hi### Assistant: yes"},
    {
        "message_tree_id": "t",
        "prompt": {
            "message_id": "a",
            "text": "hi",
            "role": "prompter",
            "replies": [{"message_id": "b", "text": "yes", "role": "assistant", "rank": 0, "replies": []}],
        },
    },
    {"message_id": "a", "parent_id": None, "message_tree_id": "t", "role": "prompter", "text": "hi", "rank": None},
    {"message_id": "b", "parent_id": "a", "message_tree_id": "t", "role": "assistant", "text": "yes", "rank": 0},
]
QUESTION = {"question": "Why?", "choices": list("abcd"), "answer": 1, "subject": "anatomy"}
FIELDS = sorted({name for row in VALID for name in row} | {"role", "content", "train", "rank", "replies", "id", "name"})

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        ["", " ", "user", "assistant", "tool", "system", "0", "A", "[]", "{}", "null", "\ud800", "[" * 9000]
    ),
    st.binary(max_size=3),  # Parquet has these
    st.dates(),
    st.decimals(allow_nan=True),
    st.just(datetime.timedelta(1)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=2), inner),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be replaced or removed inside a row."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in parts for place in [(*path, key), *places(part, (*path, key))]]


@st.composite
def damaged(draw: Callable[..., Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A valid row in which one to three things are replaced, removed or added."""
    row: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(rows)))
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(row)):
            break
        *path, last = draw(st.sampled_from(found))
        parent: Any = row
        for key in path:
            parent = parent[key]
        change = draw(st.sampled_from(("replace", "remove", "add")))
        if change == "replace":
            parent[last] = draw(VALUES)
        elif change == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(FIELDS))] = draw(VALUES)
    return row


ENCODER = ChatEncoder(tiny_tokenizer(), max_length=32)


def attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a function returns, or the message of its PaCAError; no other error is allowed."""
    try:
        return function(), None
    except PaCAError as error:
        return None, str(error)


def use(rows: list[Any], format: Any) -> None:
    """Convert and tokenize rows as the data module does; each is used, or refused with its place."""
    pairs = list(enumerate(rows, start=1))
    found, refused = attempt(lambda: list(records(pairs, "rows.jsonl", format, "text")))
    assert refused is None or "rows.jsonl, row " in refused
    encoder = DocumentEncoder(ENCODER, tree_paths="all")
    for document in encoder([(0, record) for record in found or ()]):  # the report puts the place before an error
        assert document.row in range(len(rows) + 1)
        assert document.error != ""
        if document.row == WHOLE_FILE:
            assert document.error is not None
            assert document.error.startswith("rows.jsonl, row ")


@examples()
@given(st.lists(damaged(VALID), min_size=1, max_size=3), st.sampled_from(FORMATS))
def test_rows_of_wrong_types_are_used_or_refused_with_their_place(rows: list[Any], format: str) -> None:
    use(rows, format)


@examples()
@given(damaged([QUESTION]))
def test_questions_of_wrong_types_are_used_or_refused_with_their_place(fields: dict[str, Any]) -> None:
    _, refused = attempt(lambda: check_question("questions.json, row 3", fields))
    assert refused is None or refused.startswith("questions.json, row 3: ")


def json_list(rows: list[Any]) -> bytes:
    return json.dumps(rows, default=str).encode("utf-8", "surrogatepass")


def json_lines(rows: list[Any]) -> bytes:
    return b"\n".join(json.dumps(row, default=str).encode() for row in rows)


def table(rows: list[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[str(value) for value in row.values()] for row in rows])
    return text.getvalue().encode("utf-8", "replace")


def parquet(rows: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [json.dumps(row.get(name), default=str) for row in rows] for row in rows for name in row}
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({name.encode("utf-8", "replace").decode(): found for name, found in columns.items()}), buffer
    )
    return buffer.getvalue()


WRITTEN: dict[str, Callable[[list[Any]], bytes]] = {
    "rows.json": json_list,
    "rows.jsonl": json_lines,
    "utf16.jsonl": lambda rows: json_lines(rows).decode().encode("utf-16"),
    "rows.csv": table,
    "rows.parquet": parquet,
    "rows.json.gz": lambda rows: gzip.compress(json_list(rows)),
    "rows.jsonl.bz2": lambda rows: bz2.compress(json_lines(rows)),
    "rows.jsonl.xz": lambda rows: lzma.compress(json_lines(rows)),
}


@examples()
@given(
    st.lists(damaged([*VALID, QUESTION]), min_size=1, max_size=3),
    st.sampled_from(sorted(WRITTEN)),
    st.integers(0, 2**16),
    st.sampled_from(("whole", "cut", "byte", "bytes")),
)
def test_files_of_any_content_are_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], name: str, where: int, damage: str
) -> None:
    content = bytearray(WRITTEN[name](rows))
    if damage == "cut":
        del content[where % (len(content) + 1) :]
    elif content and damage != "whole":
        for place in range(where, where + (1 if damage == "byte" else 8)):
            content[place % len(content)] ^= 1 + where % 255
    path = tmp_path_factory.mktemp("files") / name
    path.write_bytes(content)
    for read in (lambda: list(Source(str(path)).rows()), lambda: read_file(path)):
        _, refused = attempt(read)
        assert refused is None or name in refused
    found, refused = attempt(lambda: list(Source(str(path)).read()))
    assert refused is None  # what is wrong with a file is a row of its own, the last one
    assert all(name in str(row) for number, row in found or () if number == WHOLE_FILE)
    assert WHOLE_FILE not in [number for number, _ in (found or ())[:-1]]
    path.unlink()


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), decimal.Decimal("sNaN"), b"x", [[]], {"a": []}])
def test_values_that_only_parquet_has(value: Any) -> None:
    for row in VALID:
        for *path, last in places(row):
            changed: Any = copy.deepcopy(row)
            parent = changed
            for key in path:
                parent = parent[key]
            parent[last] = value
            for format in FORMATS:
                use([changed], format)


# What the examples above, and the damaged files before them, have found


def converted(*rows: Any, format: Any = "auto") -> list[str]:
    found = rows_converted(enumerate(rows, start=1), format, tree_paths="all")
    return [f"rows.jsonl, row {row}: {one}" for row, one in found]


def message(identity: Any, parent: Any, role: str = "prompter", **others: Any) -> dict[str, Any]:
    return {"message_id": identity, "parent_id": parent, "message_tree_id": "t", "role": role, "text": "x", **others}


def test_messages_that_answer_each_other_in_a_circle_are_refused() -> None:
    """Two messages of one id made a circle, and every path through it never ended."""
    rows = message("r", None), message("x", "r", "assistant"), message("r", "x")
    assert converted(*rows) == [
        "rows.jsonl, row 1: the field 'message_id' of row 3 is 'r', as that of an earlier row (format 'oasst_messages')"
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (message([], None), "the field 'message_id' is a list, expected a text or a number"),
        (message("a", {}), "the field 'parent_id' is a dict, expected a text or a number"),
        (message("a", None, message_tree_id=[]), "the field 'message_tree_id' is a list, expected a text or a number"),
        ({"prompt": {"text": "x", "role": ["prompter"]}}, "the field 'role' of a message is ['prompter'], expected"),
        (VALID[0] | {"tools": [{"name": datetime.date(2026, 1, 1)}]}, "the field 'tools' holds what is not JSON"),
        (VALID[0] | {"chat_template_kwargs": {"x": b"x"}}, "the field 'chat_template_kwargs' holds what is not JSON"),
        (VALID[0] | {"enable_thinking": "\ud800"}, "the field 'enable_thinking' holds half of a surrogate pair"),
        (VALID[4] | {"system": decimal.Decimal("sNaN")}, "the field 'system' is a Decimal, expected a string"),
    ],
)
def test_values_that_are_no_texts_are_named(row: dict[str, Any], complaint: str) -> None:
    assert [one.startswith(f"rows.jsonl, row 1: {complaint}") for one in converted(row)] == [True]


def test_a_tree_that_is_too_deep_is_named() -> None:
    node: dict[str, Any] = {"text": "x", "role": "assistant"}
    for _ in range(5000):
        node = {"text": "x", "role": "prompter", "replies": [node]}
    assert converted({"prompt": node}) == ["rows.jsonl, row 1: is nested too deeply to be read (format 'oasst')"]


def test_a_subject_that_is_no_text_is_named() -> None:
    with pytest.raises(PaCAError, match=r"row 3: \[\[\]\] is none of the 57 MMLU subjects"):
        check_question("row 3", QUESTION | {"subject": [[]]})


def test_a_broken_gzip_stream_is_named(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(json_list(VALID)))
    content[10:18] = b"\xff" * 8
    (tmp_path / "rows.json.gz").write_bytes(content)
    with pytest.raises(PaCAError, match=r"rows.json.gz: cannot be read"):
        list(Source(str(tmp_path / "rows.json.gz")).rows())
