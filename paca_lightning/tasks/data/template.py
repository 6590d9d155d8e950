"""A tokenizer's chat template: renders conversations, and tells what it reads and how it ends a turn."""

import re
from functools import cached_property
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.bounded_template import render_chat
from paca_lightning.tasks.data.conversation import Message

SENTINEL = "qPaCAq0turn0qPaCAq"
"""Replaces a message's content; plain letters and digits, which no template changes."""

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates have for it


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True))
        """Special and added tokens, any of which may end a turn; the longest first."""
        self._source = str(tokenizer.chat_template)

    def render(
        self, messages: list[Message], arguments: dict[str, Any] | None = None, generation_prompt: bool = False
    ) -> str:
        """The conversation as text.

        Args:
            messages: The turns.
            arguments: Further arguments of the template, such as `tools`.
            generation_prompt: Whether to append what comes before an answer.

        Raises:
            PaCAError: The template fails.
        """
        prepared = [self._prepared(message) for message in messages]
        try:
            text = render_chat(
                self.tokenizer, prepared, tokenize=False, add_generation_prompt=generation_prompt, **(arguments or {})
            )
        except Exception as error:  # a template is a program and may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise PaCAError(
                f"the chat template fails on turns of the roles {roles}: {type(error).__name__}: {error}. "
                "Change the data, or set `chat_template`"
            ) from error
        assert isinstance(text, str)
        return text

    def reads(self, name: str) -> bool:
        """Whether the template's source mentions a field or an argument."""
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    @cached_property
    def reasoning_field(self) -> str | None:
        """The field of an assistant's message from which the template takes its reasoning."""
        return next((name for name in _REASONING if self.reads(name)), None)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template ignores content that is a string, and renders a list of parts."""
        probe: list[Message] = [{"role": role, "content": SENTINEL} for role in ("user", "assistant")]
        parts = [{**message, "content": [{"type": "text", "text": SENTINEL}]} for message in probe]
        counts = []
        for messages in (probe, parts):
            try:
                text = render_chat(self.tokenizer, messages, tokenize=False)
            except Exception:  # the real conversation will show it
                text = ""
            counts.append(str(text).count(SENTINEL))
        return counts[0] < 2 and counts[1] == 2

    @cached_property
    def generation_prompt(self) -> str:
        """What the template appends before an answer; empty if it appends nothing."""
        question: list[Message] = [{"role": "user", "content": SENTINEL}]
        try:
            plain, asked = self.render(question), self.render(question, generation_prompt=True)
        except PaCAError:
            return ""
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(plain, asked, strict=False)))
        for stop in self.stops:  # where the texts part within a special token, the token is part of the prompt
            for found in re.finditer(re.escape(stop), asked):
                if found.start() < start < found.end():
                    start = found.start()
        return asked[start:]

    def ends_turn(self, text: str) -> bool:
        """Whether a text ends with a special or added token, apart from white space."""
        return text.rstrip().endswith(self.stops)

    def _prepared(self, message: Message) -> Message:
        """A message as the template takes it."""
        message = dict(message)
        if self.takes_parts and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if self.reasoning_field and (reasoning := message.pop("reasoning_content", None)) is not None:
            message[self.reasoning_field] = reasoning
        return message
