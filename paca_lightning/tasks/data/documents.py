"""From records to tokenized documents: conversations through the chat template, raw texts, rows of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import NOTHING, ChatEncoder, Encoded, Rendered
from paca_lightning.tasks.data.converters import TreePaths
from paca_lightning.tasks.data.formats import Record, conversations
from paca_lightning.tasks.data.pretokenized import pretokenized


class Document(NamedTuple):
    """A tokenized conversation or piece of a text, its origin, and what became of it.

    Without tokens, `error` says what is wrong with its row, or there is nothing to train in it. A document of
    preferences begins with `chosen_length` tokens of a good answer's conversation; the rest are those of a bad one's.
    """

    encoded: Encoded
    file: int
    row: int
    piece: int = 0
    format: str | None = None
    unread: Sequence[str] = ()
    remarks: Sequence[str] = ()
    error: str | None = None
    chosen_length: int | None = None


@dataclass(frozen=True)
class DocumentEncoder:
    """Tokenizes records.

    Args:
        encoder: Tokenizes conversations.
        text_column: The field of `guanaco` and `text` rows.
        tree_paths: Which paths to take through message trees.
    """

    encoder: ChatEncoder
    text_column: str = "text"
    tree_paths: TreePaths = "best"

    def __call__(self, records: Sequence[tuple[int, Record]]) -> Iterator[Document]:
        """Yield the documents of (file number, record) pairs, in their order."""
        found = [one for file, record in records for one in self._rendered(file, record)]
        texts = [one for one, _, _ in found if isinstance(one, Rendered)]
        encoded = iter(self.encoder.encode(texts))
        for one, file, record in found:
            if isinstance(one, PaCAError):
                yield Document(NOTHING, file, record.row, error=str(one))
            elif isinstance(one, Rendered):
                yield from self._pieces(next(encoded), one, file, record)
            else:
                tokens, unread = one
                yield from self._pieces(tokens, Rendered("", [], (), unread), file, record)

    def _rendered(
        self, file: int, record: Record
    ) -> Iterator[tuple[Rendered | tuple[Encoded, list[str]] | PaCAError, int, Record]]:
        if record.format == "tokens":
            try:
                yield pretokenized(record.content, len(self.encoder.tokenizer)), file, record
            except PaCAError as error:
                yield PaCAError(f"{error} (format 'tokens')"), file, record
            return
        for conversation in conversations(record, self.text_column, self.tree_paths):
            if isinstance(conversation, PaCAError):
                yield conversation, file, record
                continue
            try:
                one = self.encoder.spans(conversation)
            except PaCAError as error:
                yield PaCAError(f"{error}."), file, record
            else:
                unread = [*conversation.unread, *one.unread]
                yield Rendered(one.text, one.spans, one.remarks, unread), file, record

    def _pieces(self, encoded: Encoded, rendered: Rendered, file: int, record: Record) -> Iterator[Document]:
        max_length = self.encoder.max_length
        pieces = encoded.split(max_length) if record.format == "text" else [encoded.cut(max_length)]
        for number, piece in enumerate(pieces):
            if piece.trained.any():
                yield Document(piece, file, record.row, number, record.format, rendered.unread, rendered.remarks)
            elif number == 0:
                yield Document(NOTHING, file, record.row)
