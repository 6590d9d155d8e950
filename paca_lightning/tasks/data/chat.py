"""Tokenizes conversations and marks the tokens that the assistant has to produce."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Conversation, is_text

Span = tuple[int, int]

_SENTINEL = "qPaCAq0turn0qPaCAq"  # replaces an answer; plain letters and digits, which no template changes


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation: ids (T,), whether each is trained (T,) bool, and whether the end was cut off."""

    input_ids: np.ndarray
    trained: np.ndarray
    truncated: bool = False

    def cut(self, max_length: int) -> "Encoded":
        """The first `max_length` tokens."""
        longer = len(self.input_ids) > max_length
        return Encoded(self.input_ids[:max_length], self.trained[:max_length], longer)

    def split(self, max_length: int) -> list["Encoded"]:
        """All tokens in pieces. The first token of each is not trained, as nothing precedes it."""
        starts = range(0, len(self.input_ids), max_length)
        pieces = [Encoded(self.input_ids[i : i + max_length], self.trained[i : i + max_length].copy()) for i in starts]
        for piece in pieces:
            piece.trained[:1] = False
        return pieces


class ChatEncoder:
    """Tokenizes conversations with the tokenizer's chat template and marks the tokens to train.

    The assistant's characters are found by comparing renderings, which works with any template, also without
    `{% generation %}` marks: answer i starts where turns 0..i-1 with the generation prompt end, and ends where turns
    0..i end. If a template rewrites earlier turns (drops their reasoning, say), the answer is found by rendering the
    conversation with another text in its place.

    Args:
        tokenizer: A tokenizer with a chat template.
        max_length: Most tokens of a conversation. Callers cut what `encode` returns.
        loss_on: "assistant" trains every assistant turn with its end-of-turn token, "all" trains everything.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        loss_on: Literal["assistant", "all"] = "assistant",
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.loss_on = loss_on
        starts = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]
        self._bos = tokenizer.bos_token if starts else ""
        self._stops = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})

    def render(self, conversation: Conversation, generation_prompt: bool = False) -> str:
        """The conversation as text, by the chat template.

        Raises:
            PaCAError: The template fails.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template is a program and may raise anything
            roles = ", ".join(message["role"] for message in conversation)
            raise PaCAError(
                f"the chat template fails on turns of the roles {roles}: {type(error).__name__}: {error}. "
                "Change the data, or set `chat_template`"
            ) from error
        assert isinstance(text, str)
        return text

    def spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The rendered text, and the spans [start, end) of characters to train, one for each answer.

        A raw text does not pass the template and is trained whole, between the tokenizer's tokens that begin and end a
        text.
        """
        if is_text(conversation):
            text = f"{self._bos}{conversation[0]['content']}{self.tokenizer.eos_token or ''}"
            return text, [(0, len(text))]
        text = self.render(conversation)
        if self.loss_on == "all":
            return text, [(0, len(text))]
        turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        return text, [self._span(text, conversation, i) for i in turns]

    def encode(self, rendered: Sequence[tuple[str, list[Span]]]) -> list[Encoded]:
        """Tokenize a batch of texts with their spans to train, as `spans` returns them.

        The first token of a conversation is never trained, as nothing precedes it.
        """
        texts = [text for text, _ in rendered]
        if self.tokenizer.is_fast:
            encoding = self.tokenizer(
                texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
            )
            ids = encoding["input_ids"]
            offsets = [np.array(row).reshape(-1, 2) for row in encoding["offset_mapping"]]
            bounds = [_overlapping(row, spans) for row, (_, spans) in zip(offsets, rendered, strict=True)]
        else:
            ids = [self._ids(text) for text in texts]
            bounds = [self._token_bounds(row, *pair) for row, pair in zip(ids, rendered, strict=True)]
        return [self._encoded(row, pairs) for row, pairs in zip(ids, bounds, strict=True)]

    def _encoded(self, ids: list[int], bounds: np.ndarray) -> Encoded:
        trained = np.zeros(len(ids), dtype=bool)
        for first, last in bounds:
            trained[first:last] = True
        trained[:1] = False
        return Encoded(np.asarray(ids, dtype=np.int32), trained)

    def _span(self, text: str, conversation: Conversation, turn: int) -> Span:
        before = self.render(conversation[:turn], generation_prompt=True)
        through = self.render(conversation[: turn + 1]) if turn + 1 < len(conversation) else text
        if text.startswith(through) and text.startswith(before) and len(before) < len(through):
            return len(before), self._end(text[len(before) : len(through)], len(before))
        return self._span_by_substitution(text, conversation, turn)

    def _span_by_substitution(self, text: str, conversation: Conversation, turn: int) -> Span:
        """Find an answer by replacing it, and its end of turn by what follows it as the last turn."""
        other = [*conversation[:turn], {**conversation[turn], "content": _SENTINEL}, *conversation[turn + 1 :]]
        changed = self.render(other)
        last = self.render(other[: turn + 1])
        start = changed.find(_SENTINEL)
        tail = changed[start + len(_SENTINEL) :]
        if changed.count(_SENTINEL) != 1 or changed[:start] != text[:start] or not text.endswith(tail):
            raise PaCAError(
                f"the chat template leaves no trace of turn {turn + 1} by which to tell the assistant's tokens from "
                "the others. Set `chat_template` to one that renders turns independently of each other, or loss_on: all"
            )
        end = len(text) - len(tail)
        close = last.rpartition(_SENTINEL)[2]
        close = close if text.startswith(close, end) else close.rstrip()
        return start, self._end(text[start:end] + close, start) if text.startswith(close, end) else end

    def _end(self, answer: str, start: int) -> int:
        """The end of an answer that starts at `start`, without white space after an end-of-turn token."""
        stripped = answer.rstrip()
        return start + len(stripped if stripped.endswith(self._stops) else answer)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _token_bounds(self, ids: list[int], text: str, spans: list[Span]) -> np.ndarray:
        """Spans in tokens for tokenizers without offsets: the number of tokens of the text before each bound."""

        def count(end: int) -> int:
            prefix = self._ids(text[:end])
            return next(
                (n for n, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids))
            )

        return np.array([[count(first), count(last)] for first, last in spans])


def _overlapping(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """The tokens [first, last) that overlap each span; `offsets` (T, 2) are the tokens' own spans."""
    firsts, lasts = np.array(spans).T
    return np.stack([np.searchsorted(offsets[:, 1], firsts, "right"), np.searchsorted(offsets[:, 0], lasts)], axis=1)
