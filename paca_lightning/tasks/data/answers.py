"""Finds the answers of a conversation in its rendered text, with any chat template.

Answers are found by comparing renderings, which needs no `{% generation %}` marks: answer i starts where turns 0..i-1
with the generation prompt end, and ends where turns 0..i end. A template may close a turn in another way if it is the
last one, so the turns 0..i are also rendered with a generation prompt, which is then cut off. If a template rewrites
earlier turns (drops their reasoning, say), the answer is found by rendering the conversation with another text in its
place.
"""

from collections.abc import Iterator

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Conversation, Message
from paca_lightning.tasks.data.template import SENTINEL, ChatTemplate

Span = tuple[int, int]


def answer_span(template: ChatTemplate, text: str, conversation: Conversation, turn: int) -> Span:
    """The characters [start, end) of an answer and of the end-of-turn token after it.

    Args:
        template: The chat template.
        text: The rendered conversation.
        conversation: The conversation.
        turn: Number of the answer's message, from 0.

    Raises:
        PaCAError: The answer cannot be told from the rest of the text.
    """
    messages = conversation.messages
    before = template.render(messages[:turn], conversation.arguments, generation_prompt=True) if turn else ""
    if text.startswith(before):
        last = text if turn + 1 == len(messages) else None
        for through in _renderings(template, messages[: turn + 1], conversation, last):
            if text.startswith(through) and len(before) < len(through):
                return len(before), _end(template, text[len(before) : len(through)], len(before))
    return _span_by_substitution(template, text, conversation, turn)


def _renderings(
    template: ChatTemplate, messages: list[Message], conversation: Conversation, last: str | None = None
) -> Iterator[str]:
    """Turns up to an answer as text, closed as the last turn (`last`, if it is known) and as an earlier one."""
    yield template.render(messages, conversation.arguments) if last is None else last
    if prompt := template.generation_prompt:
        asked = template.render(messages, conversation.arguments, generation_prompt=True)
        if asked.endswith(prompt):
            yield asked.removesuffix(prompt)


def _span_by_substitution(template: ChatTemplate, text: str, conversation: Conversation, turn: int) -> Span:
    """Find an answer by replacing it, and its end of turn by what follows it at the end of a conversation."""
    messages = conversation.messages
    other = [*messages[:turn], {**messages[turn], "content": SENTINEL}, *messages[turn + 1 :]]
    changed = template.render(other, conversation.arguments)
    start = changed.find(SENTINEL)
    tail = changed[start + len(SENTINEL) :]
    if changed.count(SENTINEL) != 1 or changed[:start] != text[:start] or not text.endswith(tail):
        raise PaCAError(
            f"the chat template leaves no trace of turn {turn + 1} by which to tell the assistant's tokens from "
            "the others. Set `chat_template` to one that renders turns independently of each other, or loss_on: all"
        )
    end = len(text) - len(tail)
    closings = [rendered.rpartition(SENTINEL)[2] for rendered in _renderings(template, other[: turn + 1], conversation)]
    fitting = [close for full in closings for close in (full, full.rstrip()) if text.startswith(close, end)]
    close = next((close for close in fitting if template.ends_turn(close)), fitting[0] if fitting else "")
    return start, _end(template, text[start:end] + close, start)


def _end(template: ChatTemplate, answer: str, start: int) -> int:
    """The end of an answer that starts at `start`, without white space after an end-of-turn token."""
    stripped = answer.rstrip()
    return start + len(stripped if template.ends_turn(stripped) else answer)
