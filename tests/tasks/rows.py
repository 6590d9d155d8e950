"""Rows of instruction data, and how tests write and read them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Conversation
from paca_lightning.tasks.data.converters import TreePaths
from paca_lightning.tasks.data.formats import Format, conversations, records
from paca_lightning.tasks.data.records import Source

FIXTURES = Path(__file__).parents[1] / "data"

QUICKSTART = Path(__file__).parents[2] / "configs" / "data" / "quickstart"


def converted(
    pairs: Iterable[tuple[int, Any]],
    format: Format = "auto",
    *,
    text_column: str = "text",
    tree_paths: TreePaths = "best",
) -> list[tuple[int, Conversation | PaCAError]]:
    """(row number, conversation or what is wrong with it) of (row number, row) pairs."""
    return [
        (record.row, found)
        for record in records(pairs, "here", format, text_column)
        for found in conversations(record, text_column, tree_paths)
    ]


def read(path: Path, **options: Any) -> list[tuple[int, list[tuple[str, str]]]]:
    return [
        (row, [(message["role"], message["content"]) for message in found.messages])
        for row, found in converted(Source(str(path)).rows(), **options)
        if isinstance(found, Conversation)
    ]


PLAIN = (  # no end-of-turn token: the line break is what ends an answer
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict[str, Any]:
    turns = enumerate(contents)
    return {"messages": [{"role": roles[i % len(roles)], "content": content} for i, content in turns]}


GOOD = chat("hello", "hi")
