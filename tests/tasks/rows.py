"""Rows of instruction data, and how tests write and read them."""

import json
from pathlib import Path
from typing import Any

from paca_lightning.tasks.data.formats import conversations
from paca_lightning.tasks.data.records import Source

FIXTURES = Path(__file__).parents[1] / "data"

QUICKSTART = Path(__file__).parents[2] / "configs" / "data" / "quickstart"


def read(path: Path, **options: Any) -> list[tuple[int, list[tuple[str, str]]]]:
    settings = {"format": "auto", "text_column": "text", "tree_paths": "best"} | options
    pairs = conversations(Source(str(path)).rows(), path.name, **settings)
    return [(row, [(message["role"], message["content"]) for message in found.messages]) for row, found in pairs]


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
