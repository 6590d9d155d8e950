"""A conversation as the chat template takes it, and the checks that every conversation passes."""

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.records import Row

Message = dict[str, str]
"""One turn: its `role` (system, user or assistant) and its `content`."""

Conversation = list[Message]
"""The turns of a conversation, or a raw text as a single message of the role `text`."""


def is_text(conversation: Conversation) -> bool:
    """Whether it is a raw text without turns."""
    return len(conversation) == 1 and conversation[0]["role"] == "text"


def check_turns(conversation: Conversation) -> None:
    """Check the order of turns: an optional system message, then user and assistant in turn.

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
    """A text field of a row.

    Args:
        row: The row, or an object inside it.
        field: Name of the field.
        where: Prefix of the field's name in messages.

    Raises:
        PaCAError: The field is missing, is not a string, or cannot be encoded as UTF-8.
    """
    if field not in row:
        raise PaCAError(
            f"the field '{where}{field}' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}"
        )
    value = row[field]
    if not isinstance(value, str):
        raise PaCAError(f"the field '{where}{field}' is {kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PaCAError(f"the field '{where}{field}' holds half of a surrogate pair, which is no valid text") from error
    return value


def kind(value: object) -> str:
    """The type of a value in words, for messages."""
    return "null" if value is None else f"a {type(value).__name__}"
