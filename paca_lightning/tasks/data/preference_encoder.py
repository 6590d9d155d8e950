"""From records to tokenized preferences: both conversations of a pair in one document, with their answers marked."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import NOTHING, Encoded, Rendered
from paca_lightning.tasks.data.conversation import Conversation
from paca_lightning.tasks.data.documents import Document, DocumentEncoder
from paca_lightning.tasks.data.formats import Record, conversations
from paca_lightning.tasks.data.preferences import Side, sides_of

FORMAT = "preferences"
"""Format of rows that this encoder reads."""

_NO_CONVERSATION = ("tokens", "text", "oasst", "oasst_messages")


class PreferenceEncoder(DocumentEncoder):
    """Tokenizes records of preferences.

    A document of a pair is the chosen conversation and the rejected one behind it; `Document.chosen_length` tells where
    the first ends. A row with a label is one conversation: its `chosen_length` is its whole length, or 0. The answers
    alone are trained: of a pair, what follows the turns that both have; of a labelled row, the last turn.
    """

    def __call__(self, records: Sequence[tuple[int, Record]]) -> Iterator[Document]:
        """Yield a document for each of the (file number, record) pairs, in their order."""
        found = [(file, record, self._sides(record)) for file, record in records]
        texts = [one for _, _, sides in found if not isinstance(sides, PaCAError) for _, one, _ in sides]
        encoded = iter(self.encoder.encode(texts))
        for file, record, sides in found:
            if isinstance(sides, PaCAError):
                yield Document(NOTHING, file, record.row, error=str(sides))
            else:
                yield self._document(file, record, sides, [next(encoded) for _ in sides])

    def _document(
        self, file: int, record: Record, sides: list[tuple[Side, Rendered, list[str]]], encoded: list[Encoded]
    ) -> Document:
        cut = [one.cut(self.encoder.max_length) for one in encoded]
        same = len(cut) == 2 and np.array_equal(cut[0].input_ids, cut[1].input_ids)
        if same or not all(one.trained.any() for one in cut):  # the answers, or what tells them apart, were cut off
            return Document(NOTHING, file, record.row)
        first, rendered, unread = sides[0]
        both = Encoded(
            np.concatenate([one.input_ids for one in cut]),
            np.concatenate([one.trained for one in cut]),
            any(one.truncated for one in cut),
        )
        remarks = sorted({remark for _, one, _ in sides for remark in one.remarks})
        return Document(
            both,
            file,
            record.row,
            format=f"{first.format} ({'pairs' if len(sides) == 2 else 'labels'})",
            unread=[*unread, *rendered.unread],
            remarks=remarks,
            chosen_length=len(cut[0].input_ids) if first.good else 0,
        )

    def _sides(self, record: Record) -> list[tuple[Side, Rendered, list[str]]] | PaCAError:
        """The sides of a row, rendered, with the names of fields that nothing uses; or what is wrong with the row."""
        if record.error is not None:
            return PaCAError(record.error)
        try:
            sides = sides_of(record.content)
            found = _with_answers_marked([self._conversation(record.row, side) for side in sides])
            return [(side, self.encoder.spans(one), list(one.unread)) for side, one in zip(sides, found, strict=True)]
        except PaCAError as error:
            return PaCAError(f"{str(error).rstrip('.')}.")
        except RecursionError:
            return PaCAError("is nested too deeply to be read.")

    def _conversation(self, row: int, side: Side) -> Conversation:
        if side.format in _NO_CONVERSATION:
            raise PaCAError(f"a row of the format {side.format!r} cannot have a label: write it as a conversation")
        record = Record(row, side.format, side.row)
        (found,) = conversations(record, self.text_column, self.tree_paths)
        if isinstance(found, PaCAError):
            raise PaCAError(f"the {side.name} answer: {found}" if side.name in ("chosen", "rejected") else str(found))
        eos = self.encoder.tokenizer.eos_token
        if side.format == "segments" and side.name in ("chosen", "rejected") and eos:
            (message,) = found.messages  # raw texts have no template that would end them
            start, _ = message["spans"][0]
            text = message["content"].removesuffix(eos) + eos
            return replace(found, messages=[{**message, "content": text, "spans": [(start, len(text))]}])
        return found


def _with_answers_marked(found: list[Conversation]) -> list[Conversation]:
    """Conversations in which the turns that both have are not trained; of one alone, all but the last.

    Raises:
        PaCAError: The conversations differ before an answer, or not at all.
    """
    if any(one.is_text for one in found):
        return found
    turns = [one.messages for one in found]
    if len(turns) == 1:
        common = len(turns[0]) - 1
        if turns[0][common]["role"] != "assistant":
            raise PaCAError("the last turn is not an answer, to which the label belongs")
    else:
        pairs = enumerate(zip(*turns, strict=False))
        common = next((i for i, (one, other) in pairs if one != other), min(map(len, turns)))
        _check_difference(turns[0], turns[1], common)
    return [
        replace(
            one,
            masks=one.masks | {i: False for i, turn in enumerate(one.messages[:common]) if turn["role"] == "assistant"},
        )
        for one in found
    ]


def _check_difference(chosen: list[dict[str, str]], rejected: list[dict[str, str]], common: int) -> None:
    if common == len(chosen) == len(rejected):
        raise PaCAError("chosen and rejected are equal: nothing is preferred; remove the row")
    if common in (len(chosen), len(rejected)):
        shorter = "chosen" if common == len(chosen) else "rejected"
        raise PaCAError(f"{shorter} ends where the other one goes on, so it has no answer of its own")
    if chosen[common]["role"] != "assistant" or rejected[common]["role"] != "assistant":
        raise PaCAError(
            f"chosen and rejected have different prompts: turn {common + 1} differs, and it is not an answer. A pair "
            "compares two answers to one prompt"
        )
