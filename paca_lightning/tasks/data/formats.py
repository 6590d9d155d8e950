"""The common formats of instruction data, and which one a row has.

| format | a row |
|---|---|
| `chat` | `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}` |
| `sharegpt` | `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}` |
| `alpaca` | `{"instruction": "...", "input": "...", "output": "..."}`; or as Dolly: `context` and `response` |
| `prompt_completion` | `{"prompt": "...", "completion": "..."}`: a question and its answer for the chat template |
| `question_answer` | `{"question": "...", "answer": "..."}`, also `query`, `response`; perhaps `article` or `context` |
| `guanaco` | `{"text": "### Human: ...### Assistant: ..."}` |
| `oasst` | one OpenAssistant message tree: `{"message_tree_id": "...", "prompt": {"text", "role", "replies": [...]}}` |
| `oasst_messages` | one OpenAssistant message: `message_id`, `parent_id`, `message_tree_id`, `role`, `text`, `rank` |
| `text` | `{"text": "..."}`: a document without turns, for continued pretraining |
| `segments` | `{"segments": [{"text": "...", "label": true}, ...]}`: texts in a row, trained where `label` is true |
| `tokens` | `{"input_ids": [...], "labels": [...], "attention_mask": [...]}`; the latter two may be absent |

Rows of turns may also have a `system` text, `tools`, `documents` and settings of the chat template (`enable_thinking`,
`chat_template_kwargs`). `messages` and `conversations` are interchangeable. The content of a message may be a list of
`{"type": "text", "text": "..."}`; an assistant's message may have `tool_calls` and `reasoning_content`, any message a
mark whether it is trained (`weight`, `train`, `training`, `loss` or `loss_weight`). Alpaca rows may have a `history` of
[question, answer] pairs. `prompt` and `completion` may be lists of messages.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Conversation, check_turns
from paca_lightning.tasks.data.converters import GUANACO_MARK, LIST_FIELDS, QUESTION_ANSWER, TreePaths, converter
from paca_lightning.tasks.data.fields import Row
from paca_lightning.tasks.data.oasst import identity
from paca_lightning.tasks.data.other_tasks import refuse_other_tasks
from paca_lightning.tasks.data.records import WHOLE_FILE

Format = Literal[
    "auto",
    "chat",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "guanaco",
    "oasst",
    "oasst_messages",
    "text",
    "segments",
    "tokens",
]


@dataclass(frozen=True)
class Record:
    """A row as it was read; of `oasst_messages`, the rows of a tree.

    Attributes:
        row: Its number, or that of the tree's first row; `records.WHOLE_FILE` if the rest of its file cannot be read.
        format: Its format.
        content: The row, or (number, row) pairs.
        error: What is wrong with it instead, if it cannot be read.
    """

    row: int
    format: str = ""
    content: Any = None
    error: str | None = None


def records(
    rows: Iterable[tuple[int, Row | PaCAError]], name: str, format: Format, text_column: str
) -> Iterator[Record]:
    """Yield the rows with their format; those of `oasst_messages` tree by tree, after the last row.

    Args:
        rows: (row number, row) pairs, as from `Source.read`.
        name: The source, for messages.
        format: One of the formats above; "auto" goes by the fields of the first row.
        text_column: The field that holds the text of `guanaco` and `text` rows.

    If the first row that can be read fits no format, an error of the whole file is the last record.
    """
    trees: dict[object, list[tuple[int, Row]]] = {}
    for number, row in rows:
        if isinstance(row, PaCAError):
            yield Record(number, error=str(row))
            continue
        if format == "auto":
            try:
                format = detect(row, f"{name}, row {number}", text_column)
            except PaCAError as error:
                yield Record(WHOLE_FILE, error=str(error))
                return
        if format == "oasst_messages":
            try:
                trees.setdefault(identity(row, "message_tree_id"), []).append((number, row))
            except PaCAError as error:
                yield Record(number, error=f"{error} (format {format!r})")
        else:
            yield Record(number, format, row)
    for tree in trees.values():
        yield Record(tree[0][0], format, tree)


def conversations(record: Record, text_column: str, tree_paths: TreePaths) -> Iterator[Conversation | PaCAError]:
    """Yield the conversations of a record, or what is wrong with it, without its place.

    Args:
        record: As `records` yields them.
        text_column: The field that holds the text of `guanaco` and `text` rows.
        tree_paths: "best" takes the best-ranked reply at every message of a tree, "all" takes every path.
    """
    if record.error is not None:
        yield PaCAError(record.error)
        return
    try:
        if isinstance(record.content, dict) and record.format != "text":
            refuse_other_tasks(record.content)
        for conversation in converter(record.format, text_column, tree_paths)(record.content):
            if not conversation.is_text:
                check_turns(conversation.messages)
            yield conversation
    except PaCAError as error:
        yield PaCAError(f"{error} (format {record.format!r})")
    except RecursionError:
        yield PaCAError(f"is nested too deeply to be read (format {record.format!r})")


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
    if "input_ids" in row:
        return "tokens"
    if _holds_columns(row):
        raise PaCAError(
            f"{where}: is one object with a column in each of its fields {', '.join(map(repr, row))}. Write an object "
            "for each row, with pandas by `to_json('rows.jsonl', orient='records', lines=True)`."
        )
    if isinstance(row.get("segments"), list):
        return "segments"
    if isinstance(row.get("prompt"), dict):
        return "oasst"
    if {"message_id", "role", "text"} <= row.keys():
        if row.get("replies") or "message_tree_id" not in row:
            return "oasst"
        if "parent_id" in row:
            return "oasst_messages"
    for field in LIST_FIELDS:
        if isinstance(turns := row.get(field), str) and turns.lstrip().startswith("["):
            return "sharegpt" if '"from"' in turns else "chat"
        if isinstance(turns, list):
            named = set(turns[0]) if turns and isinstance(turns[0], dict) else set()
            return "sharegpt" if named & {"from", "value"} else "chat"
    if "instruction" in row and not row.keys().isdisjoint(("output", "response")):
        return "alpaca"
    if {"prompt", "completion"} <= row.keys():
        return "prompt_completion"
    if any({question, answer} <= row.keys() for question, answer in QUESTION_ANSWER):
        return "question_answer"
    if isinstance(text := row.get(text_column), str) and GUANACO_MARK.search(text):
        return "guanaco"
    known = ", ".join(get_args(Format)[1:])
    hints = [
        f" The field {name!r} holds {len(value):,} objects: if these are the rows, save that list alone."
        for name, value in row.items()
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
    ]
    raise PaCAError(
        f"{where}: the fields {', '.join(map(repr, row)) or '(none)'} fit no known format ({known}). Rename the "
        "fields, or set `format` (and `text_column`) if the first row is unusual; raw text needs `format: text`."
        + "".join(hints)
    )


def _holds_columns(row: Row) -> bool:
    """Whether each field holds a column of texts, by index as pandas' `to_json` writes, or as a list."""
    columns = list(row.values())
    if all(isinstance(column, dict) and column and all(key.isdigit() for key in column) for column in columns):
        return bool(columns)
    lists = [column for column in columns if isinstance(column, list) and all(isinstance(one, str) for one in column)]
    return len(lists) == len(columns) > 1 and len(set(map(len, lists))) == 1
