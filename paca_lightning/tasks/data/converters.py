"""Rows of each format to conversations. A converter takes a row and yields its conversations."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data import oasst
from paca_lightning.tasks.data.conversation import Conversation, kind, text_field
from paca_lightning.tasks.data.records import Row

TreePaths = Literal["best", "all"]
Converter = Callable[[Row], Iterator[Conversation]]

LIST_FIELDS = ("messages", "conversations", "conversation")
"""Fields that may hold the turns of a conversation."""
GUANACO_MARK = re.compile(r"### (Human|Assistant):")

_CHAT_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", **_CHAT_ROLES}
_GUANACO_ROLES = {"Human": "user", "Assistant": "assistant"}


def converter(format: str, text_column: str, tree_paths: TreePaths) -> Converter:
    """The converter of a format whose rows are conversations of their own, so any but `oasst_messages`.

    Args:
        format: One of `formats.Format`.
        text_column: The field that holds the text of `guanaco` and `text` rows.
        tree_paths: "best" takes the best-ranked reply at every message of a tree, "all" takes every path.
    """
    converters: dict[str, Converter] = {
        "chat": partial(_from_turns, role_field="role", content_field="content", roles=_CHAT_ROLES),
        "sharegpt": partial(_from_turns, role_field="from", content_field="value", roles=_SHAREGPT_ROLES),
        "alpaca": _from_alpaca,
        "prompt_completion": _from_prompt,
        "text": partial(_from_text, field=text_column),
        "guanaco": partial(_from_guanaco, field=text_column),
        "oasst": partial(_from_tree, paths=tree_paths),
    }
    return converters[format]


def from_messages(rows: list[tuple[int, Row]], paths: TreePaths) -> Iterator[Conversation]:
    """Conversations of one message tree, given as (row number, message) pairs."""
    yield from _from_paths(oasst.assemble(rows), paths)


def _from_turns(row: Row, role_field: str, content_field: str, roles: dict[str, str]) -> Iterator[Conversation]:
    field = next((field for field in LIST_FIELDS if field in row), None)
    if field is None:
        raise PaCAError(f"the field 'messages' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    turns = row[field]
    if not isinstance(turns, list):
        raise PaCAError(f"the field '{field}' is {kind(turns)}, expected a list of messages")
    conversation = _system(row)
    for i, turn in enumerate(turns):
        where = f"{field}[{i}]"
        if not isinstance(turn, dict):
            raise PaCAError(f"the field '{where}' is {kind(turn)}, expected an object")
        role = text_field(turn, role_field, f"{where}.")
        if role not in roles:
            raise PaCAError(f"the field '{where}.{role_field}' is {role!r}, expected one of {', '.join(roles)}")
        conversation.append({"role": roles[role], "content": _content(turn, content_field, f"{where}.")})
    yield conversation


def _content(turn: Row, field: str, where: str) -> str:
    """The text of a message, whose content is a string or a list of text parts."""
    parts = turn.get(field)
    if not isinstance(parts, list):
        return text_field(turn, field, where)
    texts = []
    for i, part in enumerate(parts):
        place = f"{where}{field}[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            found = repr(part.get("type")) if isinstance(part, dict) else kind(part)
            raise PaCAError(f"the field '{place}' is {found}, expected a part of the type 'text'")
        texts.append(text_field(part, "text", f"{place}."))
    return "".join(texts)


def _system(row: Row) -> Conversation:
    return [{"role": "system", "content": text_field(row, "system")}] if row.get("system") else []


def _one_turn(row: Row, user: str, answer_field: str) -> Conversation:
    answer = text_field(row, answer_field)
    return [*_system(row), {"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def _from_alpaca(row: Row) -> Iterator[Conversation]:
    user = text_field(row, "instruction")
    if row.get("input"):
        user = f"{user}\n\n{text_field(row, 'input')}"
    yield _one_turn(row, user, "output")


def _from_prompt(row: Row) -> Iterator[Conversation]:
    yield _one_turn(row, text_field(row, "prompt"), "completion")


def _from_text(row: Row, field: str) -> Iterator[Conversation]:
    text = text_field(row, field)
    if not text.strip():
        raise PaCAError(f"the field '{field}' is empty; remove the row")
    yield [{"role": "text", "content": text}]


def _from_guanaco(row: Row, field: str) -> Iterator[Conversation]:
    before, *parts = GUANACO_MARK.split(text_field(row, field))
    if before.strip() or not parts:
        raise PaCAError(f"the field '{field}' does not start with '### Human:'")
    yield [
        {"role": _GUANACO_ROLES[mark], "content": text.strip()}
        for mark, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _from_tree(row: Row, paths: TreePaths) -> Iterator[Conversation]:
    prompt = row.get("prompt")
    if not isinstance(prompt, dict):
        raise PaCAError(f"the field 'prompt' is {kind(prompt)}, expected the tree's first message")
    yield from _from_paths(prompt, paths)


def _from_paths(prompt: Row, paths: TreePaths) -> Iterator[Conversation]:
    for path in oasst.best_path(prompt) if paths == "best" else oasst.all_paths(prompt):
        yield [{"role": oasst.role(node), "content": text_field(node, "text", "prompt...")} for node in path]
