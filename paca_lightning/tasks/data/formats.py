"""The common formats of instruction data, and which one a row has.

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

Rows of turns may also have a `system` text, `tools`, `documents` and settings of the chat template (`enable_thinking`,
`chat_template_kwargs`). `messages` and `conversations` are interchangeable. The content of a message may be a list of
`{"type": "text", "text": "..."}`; an assistant's message may have `tool_calls` and `reasoning_content`, any message a
mark whether it is trained (`weight`, `train`, `loss` or `loss_weight`). Alpaca rows may have a `history` of
[question, answer] pairs. `prompt` and `completion` may be lists of messages.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Conversation, check_turns
from paca_lightning.tasks.data.converters import GUANACO_MARK, LIST_FIELDS, TreePaths, converter, from_messages
from paca_lightning.tasks.data.fields import Row
from paca_lightning.tasks.data.oasst import identity
from paca_lightning.tasks.data.other_tasks import refuse_other_tasks

Format = Literal[
    "auto", "chat", "sharegpt", "alpaca", "prompt_completion", "guanaco", "oasst", "oasst_messages", "text"
]


def conversations(
    rows: Iterable[tuple[int, Row | PaCAError]], name: str, format: Format, *, text_column: str, tree_paths: TreePaths
) -> Iterator[tuple[int, Conversation | PaCAError]]:
    """Yield (row number, conversation) for every conversation in the rows, or what is wrong with the row.

    Args:
        rows: (row number, row) pairs, as from `Source.read`.
        name: The source, for messages.
        format: One of the formats above; "auto" goes by the fields of the first row.
        text_column: The field that holds the text of `guanaco` and `text` rows.
        tree_paths: "best" takes the best-ranked reply at every message of a tree, "all" takes every path.

    Raises:
        PaCAError: The first row that can be read fits no format.
    """
    convert, broken = None, None
    trees: dict[object, list[tuple[int, Row]]] = {}
    for number, row in rows:
        where = f"{name}, row {number}"
        if isinstance(row, PaCAError):
            broken = broken or row
            yield number, row
            continue
        if format == "auto":
            try:
                format = detect(row, where, text_column)
            except PaCAError as error:
                raise broken or error from error
        if format == "oasst_messages":
            try:
                trees.setdefault(identity(row, "message_tree_id"), []).append((number, row))
            except PaCAError as error:
                yield number, PaCAError(f"{where}: {error} (format {format!r})")
            continue
        convert = convert or converter(format, text_column, tree_paths)
        yield from ((number, found) for found in _checked(convert, row, where, format))
    for tree in trees.values():
        where = f"{name}, row {tree[0][0]}"
        for found in _checked(lambda rows: from_messages(rows, tree_paths), tree, where, format):
            yield tree[0][0], found


def _checked(
    convert: Callable[[Any], Iterator[Conversation]], row: Any, where: str, format: Format
) -> Iterator[Conversation | PaCAError]:
    """The conversations of a row (of `oasst_messages`, of a tree), or what is wrong with it."""
    try:
        if isinstance(row, dict) and format != "text":
            refuse_other_tasks(row)
        for conversation in convert(row):
            if not conversation.is_text:
                check_turns(conversation.messages)
            yield replace(conversation, format=format)
    except PaCAError as error:
        yield PaCAError(f"{where}: {error} (format {format!r})")
    except RecursionError:
        yield PaCAError(f"{where}: is nested too deeply to be read (format {format!r})")


def detect(row: Row, where: str, text_column: str = "text") -> Format:
    """The format of a row, by its fields.

    Raises:
        PaCAError: The fields fit none of the formats.
    """
    try:
        if not isinstance(row.get(text_column), str):
            refuse_other_tasks(row)
    except PaCAError as error:
        raise PaCAError(f"{where}: {error}.") from error
    if isinstance(row.get("prompt"), dict):
        return "oasst"
    if {"message_id", "role", "text"} <= row.keys():
        if row.get("replies") or "message_tree_id" not in row:
            return "oasst"
        if "parent_id" in row:
            return "oasst_messages"
    for field in LIST_FIELDS:
        if isinstance(turns := row.get(field), list):
            return "sharegpt" if turns and isinstance(turns[0], dict) and "from" in turns[0] else "chat"
    if {"instruction", "output"} <= row.keys():
        return "alpaca"
    if {"prompt", "completion"} <= row.keys():
        return "prompt_completion"
    if isinstance(text := row.get(text_column), str) and GUANACO_MARK.search(text):
        return "guanaco"
    known = ", ".join(get_args(Format)[1:])
    for field, value in row.items():
        if len(row) == 1 and isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            raise PaCAError(
                f"{where}: is one object whose field {field!r} holds {len(value):,} objects. If these are the rows, "
                "save that list alone."
            )
    raise PaCAError(
        f"{where}: the fields {', '.join(map(repr, row)) or '(none)'} fit no known format ({known}). Rename the "
        "fields, or set `format` (and `text_column`) if the first row is unusual; raw text needs `format: text`."
    )
