"""An endless stream of batches from files that are larger than memory: read, tokenized and shuffled block by block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.collate import DocumentReader, Documents
from paca_lightning.tasks.data.documents import Document, DocumentEncoder
from paca_lightning.tasks.data.formats import Record
from paca_lightning.tasks.data.records import WHOLE_FILE, with_place
from paca_lightning.tasks.data.report import SplitReport
from paca_lightning.tasks.data.sampler import BatchOrder
from paca_lightning.tasks.data.tokenization import Rows, document_table

_ENCODED_AT_ONCE = 256  # rows


class Position(NamedTuple):
    """Where a reader stands: passes over the data, blocks of the pass, and batches of the block, each from 0."""

    round: int = 0
    block: int = 0
    batches: int = 0


class StreamedBatch(NamedTuple):
    """A batch, the reader's position after it, and the bad rows that were dropped on the way."""

    batch: dict[str, Tensor]
    position: Position
    dropped: list[str]


@dataclass(frozen=True)
class DocumentStream:
    """Batches of a reader, which takes every `readers`-th row: a pure function of the data, the seed and a position.

    Each block of rows is tokenized, packed if that is wanted, and put in an order drawn from (seed, round, block).
    A reader keeps its rows of one block in memory, and no more.

    Args:
        rows: The sources.
        encode: Tokenizes their rows.
        collate: Makes a batch.
        batch_size: Rows in a batch, at most.
        block_rows: Rows of a block, of all readers together.
        group_by_length: Batch rows of similar length.
        pack_to: Pack documents of a block into rows of this many tokens; None for one document a row.
        seed: Seed of the order.
        drop_bad_rows: Leave out rows that cannot be used; otherwise they are an error.
    """

    rows: Sequence[Rows]
    encode: DocumentEncoder
    collate: Callable[[Documents], dict[str, Tensor]]
    batch_size: int
    block_rows: int
    group_by_length: bool = True
    pack_to: int | None = None
    seed: int = 0
    drop_bad_rows: bool = False

    def batches(self, reader: int = 0, readers: int = 1, start: Position | None = None) -> Iterator[StreamedBatch]:
        """Yield batches without end, from a position on.

        Raises:
            PaCAError: A source or row cannot be read, or a whole round has no token to train.
        """
        start = start or Position()
        dropped: list[str] = []
        for number in count(start.round):
            empty = True
            for block, share in enumerate(self._shares(reader, readers)):
                if (number, block) < start[:2]:
                    empty = False
                    continue
                documents, bad = self._tokenized(share)
                dropped += bad if number == 0 else []  # later rounds drop the same
                skipped = start.batches if (number, block) == start[:2] else 0
                epoch = (number << 32) + block  # an order of its own for each block of each round
                for used, batch in enumerate(self._of_block(documents, epoch, skipped), start=skipped + 1):
                    empty = False
                    yield StreamedBatch(batch, Position(number, block, used), dropped)
                    dropped = []
            if empty and start[1:] == (0, 0):
                raise PaCAError(
                    f"{self.rows[0].sources[0].location}: none of the rows that reader {reader + 1} of {readers} takes "
                    "has a token to train. Use more data, or fewer processes and workers."
                )
            start = Position(number + 1)

    def _of_block(self, documents: list[Document], epoch: int, skipped: int) -> Iterator[dict[str, Tensor]]:
        if not documents:
            return
        lengths = np.array([len(document.encoded.input_ids) for document in documents])
        order = BatchOrder(
            lengths,
            self.batch_size,
            group_by_length=self.group_by_length,
            pack_to=self.pack_to,
            seed=self.seed,
        )
        reader = DocumentReader(Dataset(document_table(documents)))
        for batch in order.batches(epoch, skipped):
            yield self.collate(reader.__getitems__(batch))

    def _shares(self, reader: int, readers: int) -> Iterator[list[tuple[int, Record]]]:
        """The reader's rows of each block of a round."""
        share: list[tuple[int, Record]] = []
        for number, record in enumerate(self.records()):
            if number and number % self.block_rows == 0:
                yield share
                share = []
            if number % readers == reader:
                share.append(record)
        yield share

    def records(self) -> Iterator[tuple[int, Record]]:
        """(file number, record) pairs of a round, in the order of the files."""
        first = 0
        for rows in self.rows:
            for file, record in rows.records(self.encode.text_column):
                yield first + file, record
            first += len(rows.sources)

    def locations(self) -> tuple[str, ...]:
        """The files, by number."""
        return tuple(source.location for rows in self.rows for source in rows.sources)

    def _tokenized(self, share: list[tuple[int, Record]]) -> tuple[list[Document], list[str]]:
        """The documents with tokens, and what is wrong with the rows that cannot be used."""
        chunks = range(0, len(share), _ENCODED_AT_ONCE)
        found = [one for first in chunks for one in self.encode(share[first : first + _ENCODED_AT_ONCE])]
        locations = self.locations()
        wrong = [one for one in found if one.error is not None]
        bad = [with_place(one.error or "", locations[one.file], one.row) for one in wrong]
        files = sum(one.row == WHOLE_FILE for one in wrong)
        if bad and (files or not self.drop_bad_rows):
            raise PaCAError(SplitReport(bad, files).bad_row_list("a block of the stream"))
        return [one for one in found if len(one.encoded.input_ids)], bad

    def identity(self) -> dict[str, Any]:
        """What the order of batches depends on; of files their number and size."""
        paths = [source.path for rows in self.rows for source in rows.sources]
        return {
            "files": len(paths),
            "bytes": sum(path.stat().st_size for path in paths if path.is_file()),
            "batch_size": self.batch_size,
            "shuffle_buffer": self.block_rows,
            "pack_to": self.pack_to or 0,
            "seed": self.seed,
            "group_by_length": self.group_by_length,
        }
