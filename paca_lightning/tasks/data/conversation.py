"""A conversation as the chat template takes it, and the checks that every conversation passes."""

from dataclasses import dataclass, field
from typing import Any

from paca_lightning.core.errors import PaCAError

Message = dict[str, Any]
"""One turn: its `role` (system, user, assistant or tool), its `content`, and what else the chat template takes of it:
`tool_calls` and `reasoning_content` of an assistant's turn, `name` and `tool_call_id` of a tool's."""


@dataclass(frozen=True)
class Conversation:
    """A conversation, or a raw text.

    Attributes:
        messages: The turns; of a raw text, one message of the role `text`.
        arguments: Arguments of the chat template, such as `tools`, `documents` and `enable_thinking`.
        masks: For turns that the data mark, whether they are trained, by their number from 0.
        unread: Names of the fields of its row that nothing uses.
    """

    messages: list[Message]
    arguments: dict[str, Any] = field(default_factory=dict)
    masks: dict[int, bool] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether it is a raw text without turns."""
        return len(self.messages) == 1 and self.messages[0]["role"] == "text"


def text_document(text: str, unread: tuple[str, ...] = ()) -> Conversation:
    """A raw text as a conversation."""
    return Conversation([{"role": "text", "content": text}], unread=unread)


def check_turns(messages: list[Message]) -> None:
    """Check the order of turns: an optional system message, then user and assistant in turn, tools in between.

    Raises:
        PaCAError: Roles out of order, no assistant turn, or an empty assistant turn.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    offset = len(messages) - len(turns) + 1
    due: tuple[str, ...] = ("user",)
    for i, message in enumerate(turns):
        role = message["role"]
        if role not in due:
            raise PaCAError(
                f"roles out of order: turn {i + offset} has the role {role!r} where {' or '.join(map(repr, due))} is "
                "due; a conversation is an optional system message, then user and assistant by turns, with the results "
                "of tools after an assistant's tool calls"
            )
        if role == "assistant":
            calls = bool(message.get("tool_calls"))
            if not calls and not message["content"].strip():
                raise PaCAError(f"the assistant's turn {i + offset} is empty")
            due = ("tool", "user") if calls else ("user",)
        else:
            due = ("assistant",) if role == "user" else ("tool", "assistant")
    if not any(message["role"] == "assistant" for message in turns):
        raise PaCAError("a conversation without an assistant turn: nothing to learn from; remove the row")
