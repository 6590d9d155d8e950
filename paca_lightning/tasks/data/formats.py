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

Rows of `chat`, `sharegpt`, `alpaca` and `prompt_completion` may also have a `system` text. `messages` and
`conversations` are interchangeable. The content of a message may be a list of `{"type": "text", "text": "..."}`.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import Literal, get_args

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Conversation, check_turns, is_text
from paca_lightning.tasks.data.converters import GUANACO_MARK, LIST_FIELDS, TreePaths, converter, from_messages
from paca_lightning.tasks.data.records import Row

Format = Literal[
    "auto", "chat", "sharegpt", "alpaca", "prompt_completion", "guanaco", "oasst", "oasst_messages", "text"
]


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
    for number, found in _converted(rows, format, text_column, tree_paths):
        try:
            for conversation in found:
                if not is_text(conversation):
                    check_turns(conversation)
                yield number, conversation
        except PaCAError as error:
            raise PaCAError(f"{name}, row {number}: {error} (format {format!r})") from error


def _converted(
    rows: Iterator[tuple[int, Row]], format: Format, text_column: str, tree_paths: TreePaths
) -> Iterator[tuple[int, Iterator[Conversation]]]:
    """Each row's number and conversations; of `oasst_messages`, those of each tree and its first row's number."""
    if format == "oasst_messages":
        for _, tree in groupby(rows, key=lambda row: row[1].get("message_tree_id")):
            messages = list(tree)
            yield messages[0][0], from_messages(messages, tree_paths)
    else:
        convert = converter(format, text_column, tree_paths)
        for number, row in rows:
            yield number, convert(row)


def detect(row: Row, where: str, text_column: str = "text") -> Format:
    """The format of a row, by its fields.

    Raises:
        PaCAError: The fields fit none of the formats.
    """
    if isinstance(row.get("prompt"), dict):
        return "oasst"
    if {"message_id", "parent_id", "role", "text"} <= row.keys():
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
    raise PaCAError(
        f"{where}: the fields {', '.join(map(repr, row)) or '(none)'} fit no known format ({known}). Rename the "
        "fields, or set `format` (and `text_column`) if the first row is unusual; raw text needs `format: text`."
    )
