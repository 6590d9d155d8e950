"""Tokenizes conversations and marks the tokens that the assistant has to produce."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.answers import Span, answer_span
from paca_lightning.tasks.data.conversation import Conversation
from paca_lightning.tasks.data.remarks import remarks
from paca_lightning.tasks.data.template import ChatTemplate


class Rendered(NamedTuple):
    """A conversation as text, the spans of characters to train, what the template did (`remarks`) and did not read."""

    text: str
    spans: list[Span]
    remarks: Sequence[str] = ()
    unread: Sequence[str] = ()


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


NOTHING = Encoded(np.empty(0, np.int32), np.empty(0, bool))
"""No tokens."""


class ChatEncoder:
    """Tokenizes conversations with the tokenizer's chat template and marks the tokens to train.

    Args:
        tokenizer: A tokenizer with a chat template.
        max_length: Most tokens of a conversation. Callers cut what `encode` returns.
        loss_on: "assistant" trains every assistant turn with its end-of-turn token, "all" trains everything. Answers
            that the data mark as not trained are left out of both.
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
        self.template = ChatTemplate(tokenizer)
        starts = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]
        self._bos_token = tokenizer.bos_token
        self._bos = str(self._bos_token) if starts else ""
        self._eos = str(tokenizer.eos_token or "")

    def spans(self, conversation: Conversation) -> Rendered:
        """Render a conversation, and find the characters to train.

        A raw text does not pass the template and is trained whole, between the tokenizer's tokens that begin and end a
        text, which are not doubled. One with spans of its own stays as it is.

        Raises:
            PaCAError: The template fails, does not read what the conversation has, or hides an answer.
        """
        if conversation.is_text:
            text = conversation.messages[0]["content"]
            if (marked := conversation.messages[0].get("spans")) is not None:
                return Rendered(text, marked)
            if self._bos and text.startswith(self._bos):
                text = text[len(self._bos) :]
            if self._eos and text.endswith(self._eos):
                text = text[: -len(self._eos)]
            text = f"{self._bos}{text}{self._eos}"
            return Rendered(text, [(0, len(text))])
        conversation, unread = self._checked(conversation), self._unread(conversation)
        text = self.template.render(conversation.messages, conversation.arguments)
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        masks = conversation.masks
        if self.loss_on == "all" and all(masks.values()):
            return self._trimmed(Rendered(text, [(0, len(text))], (), unread))
        spans = {i: answer_span(self.template, text, conversation, i) for i in answers}
        found = remarks(self.template, conversation, text, spans)
        trained = [span for i, span in spans.items() if masks.get(i, True)]
        if self.loss_on == "all":
            trained = _complement([spans[i] for i in answers if not masks.get(i, True)], len(text))
        return self._trimmed(Rendered(text, trained, found, unread))

    def _checked(self, conversation: Conversation) -> Conversation:
        """A conversation all of which the template reads, without tokens that the template will double."""
        needed: set[str] = {name for name in ("tools", "documents") if name in conversation.arguments}
        needed |= {"tool_calls" for message in conversation.messages if "tool_calls" in message}
        missing = [f"'{name}'" for name in sorted(needed) if not self.template.reads(name)]
        if any("reasoning_content" in message for message in conversation.messages):
            missing += [] if self.template.reasoning_field else ["'reasoning_content'"]
        if missing:
            raise PaCAError(
                f"the chat template does not read {' and '.join(missing)}. Use a model whose template does, set "
                "`chat_template`, or remove them from the data"
            )
        for number, mask in conversation.masks.items():
            role = conversation.messages[number]["role"]
            if role != "assistant" and mask is False and self.loss_on == "all":
                raise PaCAError(f"turn {number + 1} ({role}) is marked as not trained, which loss_on: all cannot do")
        messages = [dict(message) for message in conversation.messages]
        for message in messages:
            content = message["content"].rstrip()
            if message["role"] == "assistant" and self._eos and content.endswith(self._eos):
                kept = content[: -len(self._eos)]
                message["content"] = kept if kept.strip() else message["content"]
        bos = self._bos_token
        if bos and messages[0]["content"].startswith(bos):
            messages[0]["content"] = messages[0]["content"][len(bos) :]
        return Conversation(messages, conversation.arguments, conversation.masks)

    def _unread(self, conversation: Conversation) -> list[str]:
        """Names of what nothing uses: arguments that the template does not read, marks on turns never trained."""
        unread = [name for name in conversation.arguments if not self.template.reads(name)]
        roles = {conversation.messages[number]["role"] for number, mask in conversation.masks.items() if mask}
        if self.loss_on == "assistant":
            unread += [f"marks to train {role} turns" for role in sorted(roles - {"assistant"})]
        return unread

    def _trimmed(self, rendered: Rendered) -> Rendered:
        """A text whose first and last token are not doubled by the template."""
        text, spans = rendered.text, rendered.spans
        bos, eos = self._bos_token, self._eos
        while bos and text.startswith(bos * 2):
            text = text[len(bos) :]
            spans = [(max(0, start - len(bos)), end - len(bos)) for start, end in spans]
        while eos and text.rstrip().endswith(eos) and (before := text.rstrip()[: -len(eos)].rstrip()).endswith(eos):
            text = before
            spans = [(start, min(end, len(text))) for start, end in spans]
        return Rendered(text, spans, rendered.remarks, rendered.unread)

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokenize a batch of texts with their spans to train, as `spans` returns them.

        The first token of a conversation is never trained, as nothing precedes it.
        """
        if not rendered:
            return []
        texts = [one.text for one in rendered]
        if self.tokenizer.is_fast:
            unused = {"return_attention_mask": False, "return_token_type_ids": False}
            encoding = self.tokenizer(texts, add_special_tokens=False, verbose=False, **unused)
            ids, found = encoding["input_ids"], encoding.encodings
            bounds = [_overlapping(one, row) for row, one in zip(rendered, found, strict=True)]
        else:
            ids = [self._ids(text) for text in texts]
            bounds = [self._token_bounds(row, one.text, one.spans) for row, one in zip(ids, rendered, strict=True)]
        return [self._encoded(row, pairs) for row, pairs in zip(ids, bounds, strict=True)]

    def _encoded(self, ids: list[int], bounds: np.ndarray) -> Encoded:
        trained = np.zeros(len(ids), dtype=bool)
        for first, last in bounds:
            trained[first:last] = True
        trained[:1] = False
        return Encoded(np.asarray(ids, dtype=np.int32), trained)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _token_bounds(self, ids: list[int], text: str, spans: list[Span]) -> np.ndarray:
        """Spans in tokens for tokenizers without offsets: the number of tokens of the text before each bound."""

        def count(end: int) -> int:
            prefix = self._ids(text[:end])
            return next(
                (n for n, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids))
            )

        return np.array([[count(first), count(last)] for first, last in spans]).reshape(-1, 2)


def _overlapping(encoding: Encoding, rendered: Rendered) -> np.ndarray:
    """The tokens [first, last) that overlap each span."""
    length, count = len(rendered.text), len(encoding)

    def next_token(start: int) -> int:
        """The first token with a character from `start` on; some characters, such as spaces, may be in none."""
        tokens = (encoding.char_to_token(character) for character in range(start, length))
        return next((token for token in tokens if token is not None), count)

    def starts_before(token: int, end: int) -> bool:
        characters = encoding.token_to_chars(token)
        return characters is not None and characters[0] < end

    def last_token(end: int) -> int:
        token = next_token(end)
        if token < count and starts_before(token, end):
            return token + 1
        while token and not starts_before(token - 1, end):  # a token without characters
            token -= 1
        return token

    pairs = [(next_token(start), last_token(end)) for start, end in rendered.spans]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _complement(spans: list[Span], length: int) -> list[Span]:
    """The spans between these, in order."""
    bounds = [0, *(bound for span in sorted(spans) for bound in span), length]
    return [(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True) if start < end]
