"""Rows of the common instruction data formats, turned into one list of chat messages each.

| format | a row |
|---|---|
| `chat` | `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}` |
| `sharegpt` | `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}` |
| `alpaca` | `{"instruction": "...", "input": "...", "output": "..."}`; `input` may be empty or absent |
| `prompt_completion` | `{"prompt": "...", "completion": "..."}`: a question and its answer for the chat template |
| `guanaco` | `{"text": "### Human: ...### Assistant: ..."}` |
| `oasst` | one OpenAssistant message tree: `{"message_tree_id": "...", "prompt": {"text", "role", "replies": [...]}}` |
| `oasst_messages` | one OpenAssistant message: `message_id`, `parent_id`, `message_tree_id`, `role`, `text`, `rank` |
| `text` | `{"text": "..."}`: a document without turns, for continued pretraining |

`chat`, `sharegpt`, `alpaca` and `prompt_completion` rows may have a `system` text beside; `messages` and
`conversations` may stand for each other. The content of a message may be a list of `{"type": "text", "text": "..."}`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, groupby
from typing import Any, Literal, get_args

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data import oasst
from paca_lightning.tasks.data.records import Row

Format = Literal[
    "auto", "chat", "sharegpt", "alpaca", "prompt_completion", "guanaco", "oasst", "oasst_messages", "text"
]
TreePaths = Literal["best", "all"]


Message = dict[str, str]
"""One turn: its `role` (system, user or assistant) and its `content`."""

Conversation = list[Message]
"""Its turns; or a raw text, as the only message, of the role `text`."""

_LIST_FIELDS = ("messages", "conversations", "conversation")
_CHAT_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", **_CHAT_ROLES}
_GUANACO_ROLES = {"Human": "user", "Assistant": "assistant"}
_GUANACO_MARK = re.compile(r"### (Human|Assistant):")


def conversations(
    rows: Iterable[tuple[int, Row]], name: str, format: Format, *, text_column: str, tree_paths: TreePaths
) -> Iterator[tuple[int, Conversation]]:
    """Yield (row number, conversation) for every conversation in the rows.

    Args:
        rows: (row number, row) pairs, as from `Source.rows`.
        name: The source, for messages.
        format: One of the formats above; "auto" goes by the fields of the first row.
        text_column: The field that holds the text of `guanaco` and `text` rows.
        tree_paths: "best" takes the best-ranked reply at every message of a tree, "all" takes every path.

    Raises:
        PaCAError: A row is malformed; the message names the source, the row and the field.
    """
    rows = iter(rows)
    if format == "auto":
        first = next(rows)
        format = detect(first[1], f"{name}, row {first[0]}", text_column)
        rows = chain([first], rows)
    convert: Callable[[Any], Iterator[Conversation]]
    if format == "oasst_messages":
        trees = groupby(rows, key=lambda row: row[1].get("message_tree_id"))
        pairs: Iterator[tuple[int, Any]] = ((group[0][0], group) for group in (list(group) for _, group in trees))
        convert = partial(_from_messages, paths=tree_paths)
    else:
        pairs = iter(rows)
        converters: dict[str, Callable[[Any], Iterator[Conversation]]] = {
            "chat": partial(_from_turns, role_field="role", content_field="content", roles=_CHAT_ROLES),
            "sharegpt": partial(_from_turns, role_field="from", content_field="value", roles=_SHAREGPT_ROLES),
            "alpaca": _from_alpaca,
            "prompt_completion": _from_prompt,
            "text": partial(_from_text, field=text_column),
            "guanaco": partial(_from_guanaco, field=text_column),
            "oasst": partial(_from_tree, paths=tree_paths),
        }
        convert = converters[format]
    for number, row in pairs:
        try:
            for conversation in convert(row):
                if not is_text(conversation):
                    check_turns(conversation)
                yield number, conversation
        except PaCAError as error:
            raise PaCAError(f"{name}, row {number}: {error} (format {format!r})") from error


def detect(row: Row, where: str, text_column: str = "text") -> Format:
    """Name the format of a row by its fields.

    Raises:
        PaCAError: The fields fit none of the formats.
    """
    if isinstance(row.get("prompt"), dict):
        return "oasst"
    if {"message_id", "parent_id", "role", "text"} <= row.keys():
        return "oasst_messages"
    for field in _LIST_FIELDS:
        if isinstance(turns := row.get(field), list):
            return "sharegpt" if turns and isinstance(turns[0], dict) and "from" in turns[0] else "chat"
    if {"instruction", "output"} <= row.keys():
        return "alpaca"
    if {"prompt", "completion"} <= row.keys():
        return "prompt_completion"
    if isinstance(text := row.get(text_column), str) and _GUANACO_MARK.search(text):
        return "guanaco"
    known = ", ".join(get_args(Format)[1:])
    raise PaCAError(
        f"{where}: the fields {', '.join(map(repr, row)) or '(none)'} fit no known format ({known}). Rename the "
        "fields, or set `format` (and `text_column`) if the first row is unusual; raw text needs `format: text`."
    )


def is_text(conversation: Conversation) -> bool:
    """Whether it is a raw text, without turns."""
    return len(conversation) == 1 and conversation[0]["role"] == "text"


def check_turns(conversation: Conversation) -> None:
    """Check that turns go: an optional system message, then user and assistant by turns.

    Raises:
        PaCAError: Roles out of order, no assistant turn, or an empty assistant turn.
    """
    turns = conversation[1:] if conversation and conversation[0]["role"] == "system" else conversation
    offset = len(conversation) - len(turns) + 1
    for i, message in enumerate(turns):
        due = ("user", "assistant")[i % 2]
        if message["role"] != due:
            raise PaCAError(
                f"roles out of order: turn {i + offset} has the role {message['role']!r} where {due!r} is due; "
                "a conversation is an optional system message, then user and assistant by turns"
            )
        if due == "assistant" and not message["content"].strip():
            raise PaCAError(f"the assistant's turn {i + offset} is empty")
    if len(turns) < 2:
        raise PaCAError("a conversation without an assistant turn: nothing to learn from; remove the row")


def text_field(row: Row, field: str, where: str = "") -> str:
    """Return a text field of a row; `where` prefixes the field's name in messages.

    Raises:
        PaCAError: The field is missing, is not a string, or cannot be written as UTF-8.
    """
    if field not in row:
        raise PaCAError(
            f"the field '{where}{field}' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}"
        )
    value = row[field]
    if not isinstance(value, str):
        raise PaCAError(f"the field '{where}{field}' is {_kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PaCAError(f"the field '{where}{field}' holds half of a surrogate pair, which is no valid text") from error
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _system(row: Row) -> Conversation:
    return [{"role": "system", "content": text_field(row, "system")}] if row.get("system") else []


def _from_turns(row: Row, role_field: str, content_field: str, roles: dict[str, str]) -> Iterator[Conversation]:
    field = next((field for field in _LIST_FIELDS if field in row), None)
    if field is None:
        raise PaCAError(f"the field 'messages' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    turns = row[field]
    if not isinstance(turns, list):
        raise PaCAError(f"the field '{field}' is {_kind(turns)}, expected a list of messages")
    conversation = _system(row)
    for i, turn in enumerate(turns):
        where = f"{field}[{i}]"
        if not isinstance(turn, dict):
            raise PaCAError(f"the field '{where}' is {_kind(turn)}, expected an object")
        role = text_field(turn, role_field, f"{where}.")
        if role not in roles:
            raise PaCAError(f"the field '{where}.{role_field}' is {role!r}, expected one of {', '.join(roles)}")
        conversation.append({"role": roles[role], "content": _content(turn, content_field, f"{where}.")})
    yield conversation


def _content(turn: Row, field: str, where: str) -> str:
    parts = turn.get(field)
    if not isinstance(parts, list):
        return text_field(turn, field, where)
    texts = []
    for i, part in enumerate(parts):
        place = f"{where}{field}[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
            raise PaCAError(f"the field '{place}' is {kind}, expected a part of the type 'text'")
        texts.append(text_field(part, "text", f"{place}."))
    return "".join(texts)


def _from_alpaca(row: Row) -> Iterator[Conversation]:
    user = text_field(row, "instruction")
    if row.get("input"):
        user = f"{user}\n\n{text_field(row, 'input')}"
    yield [
        *_system(row),
        {"role": "user", "content": user},
        {"role": "assistant", "content": text_field(row, "output")},
    ]


def _from_prompt(row: Row) -> Iterator[Conversation]:
    yield [
        *_system(row),
        {"role": "user", "content": text_field(row, "prompt")},
        {"role": "assistant", "content": text_field(row, "completion")},
    ]


def _from_text(row: Row, field: str) -> Iterator[Conversation]:
    text = text_field(row, field)
    if not text.strip():
        raise PaCAError(f"the field '{field}' is empty; remove the row")
    yield [{"role": "text", "content": text}]


def _from_guanaco(row: Row, field: str) -> Iterator[Conversation]:
    before, *parts = _GUANACO_MARK.split(text_field(row, field))
    if before.strip() or not parts:
        raise PaCAError(f"the field '{field}' does not start with '### Human:'")
    yield [
        {"role": _GUANACO_ROLES[mark], "content": text.strip()}
        for mark, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _from_tree(row: Row, paths: TreePaths) -> Iterator[Conversation]:
    prompt = row.get("prompt")
    if not isinstance(prompt, dict):
        raise PaCAError(f"the field 'prompt' is {_kind(prompt)}, expected the tree's first message")
    yield from _from_paths(prompt, paths)


def _from_messages(rows: list[tuple[int, Row]], paths: TreePaths) -> Iterator[Conversation]:
    yield from _from_paths(oasst.assemble(rows), paths)


def _from_paths(prompt: Row, paths: TreePaths) -> Iterator[Conversation]:
    for path in oasst.best_path(prompt) if paths == "best" else oasst.all_paths(prompt):
        yield [{"role": oasst.role(node), "content": text_field(node, "text", "prompt...")} for node in path]
