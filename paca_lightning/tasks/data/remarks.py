"""What a chat template did to a conversation, if it is not what the data say."""

from paca_lightning.tasks.data.answers import Span
from paca_lightning.tasks.data.conversation import Conversation
from paca_lightning.tasks.data.template import ChatTemplate

REMARKS = {
    "left_out": "leaves out the text of an answer, or part of it",
    "reasoning": "leaves out the reasoning of an answer",
    "context": "leaves out the text of a turn that is not an answer",
    "added": "adds text of its own to an answer, which is trained",
    "unended": "has no end-of-turn token after an answer, so the model does not learn to stop",
}
"""Kinds of remarks; each continues "the chat template"."""


def remarks(template: ChatTemplate, conversation: Conversation, text: str, spans: dict[int, Span]) -> list[str]:
    """Kinds of what the template did to a conversation.

    Args:
        template: The chat template.
        conversation: The conversation.
        text: The rendered conversation.
        spans: The span of each answer in the text, by the number of its message.
    """
    found = set()
    for turn, message in enumerate(conversation.messages):
        if turn not in spans:
            if not _holds(text, message["content"]):
                found.add("left_out" if message["role"] == "assistant" else "context")
            continue
        start, end = spans[turn]
        answer = text[start:end]
        if not _holds(answer, message["content"]):
            found.add("left_out")
        reasoning = message.get("reasoning_content")
        if reasoning is not None and not _holds(answer, reasoning):
            found.add("reasoning")
        if not template.ends_turn(answer):
            found.add("unended")
        if reasoning is None and "tool_calls" not in message and _adds_text(template, answer, message["content"]):
            found.add("added")
    return sorted(found)


def _holds(text: str, part: str) -> bool:
    """Whether a text has another in it, whatever their white space."""
    return part.strip() in text or _squeezed(part) in _squeezed(text)


def _squeezed(text: str) -> str:
    """A text without white space, which templates trim and add."""
    return "".join(text.split())


def _adds_text(template: ChatTemplate, answer: str, content: str) -> bool:
    """Whether a rendered answer has more than its content, the end-of-turn token and a header of special tokens."""
    before, found, after = answer.partition(content.strip())
    if not found:
        return False
    header = before.strip()
    if header and not header.startswith(tuple(template.tokenizer.all_special_tokens)):  # as gpt-oss's <|channel|>
        return True
    for stop in template.stops:
        after = after.replace(stop, "")
    return bool(after.strip())
