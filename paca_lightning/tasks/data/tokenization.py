"""Tokenizes the rows of a source in several processes, and caches the documents as memory-mapped Arrow."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from datasets.utils import tqdm

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.cache import cached_files
from paca_lightning.tasks.data.chat import NOTHING
from paca_lightning.tasks.data.documents import Document, DocumentEncoder
from paca_lightning.tasks.data.formats import Format, Record, records
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.row_json import from_json, to_json
from paca_lightning.tasks.data.tokenizer import tokenizer_fingerprint

_VERSION = 7  # of the cached documents: raise it when the same rows and settings give others
_RECORDS_PER_PROCESS = 2000  # fewer are not worth starting a process
_RECORDS_PER_BATCH = 1000

_RECORDS = Features(
    {
        "content": Value("string"),  # JSON
        "error": Value("string"),
        "format": Value("string"),
        "file": Value("int32"),
        "row": Value("int64"),
    }
)
_DOCUMENTS = Features(
    {
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "length": Value("int32"),
        "trained_length": Value("int32"),
        "truncated": Value("bool"),
        "file": Value("int32"),
        "row": Value("int64"),
        "piece": Value("int32"),
        "error": Value("string"),
        "format": Value("string"),
        "unread": List(Value("string")),
        "remarks": List(Value("string")),
        "chosen_length": Value("int32"),
    }
)


@dataclass(frozen=True)
class Rows:
    """Which rows of which files to read, and how.

    Args:
        sources: The files; at least one.
        format: Format of the rows, see `formats`.
        rows: Which rows to take, counted from 0 over all sources.
    """

    sources: Sequence[Source]
    format: Format = "auto"
    rows: slice = field(default_factory=lambda: slice(None))

    def records(self, text_column: str) -> Iterator[tuple[int, Record]]:
        """Yield (file number, record) pairs.

        Raises:
            PaCAError: A source cannot be read, a slice is empty, or the rows of a file fit no format.
        """
        rows, sources = self.rows, self.sources
        taken = islice(((i, pair) for i, source in enumerate(sources) for pair in source.read()), rows.start, rows.stop)
        first = next(taken, None)
        if first is None:
            raise PaCAError(f"{sources[0].location}: has no rows from {rows.start or 0} on. Correct the split's slice.")
        for file, pairs in groupby(chain([first], taken), key=itemgetter(0)):
            found = records((pair for _, pair in pairs), sources[file].location, self.format, text_column)
            yield from ((file, record) for record in found)


def tokenized(
    rows: Rows,
    encode: DocumentEncoder,
    *,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    name: str = "data",
) -> Dataset:
    """Read, convert and tokenize rows, or load the documents from the cache if no content and no setting has changed.

    Rows stream through `datasets` in batches, so memory is bounded for any number of rows.

    Args:
        rows: The rows.
        encode: Tokenizes them.
        cache_dir: The cache. None: that of `datasets`.
        num_proc: Processes that tokenize. None: one for each core of the machine, and one alone for few rows.
        name: Name of the split, for the progress bar.

    Returns:
        A row for each document: columns `input_ids`, `trained` (bool per token), their numbers `length` and
        `trained_length`, `truncated`, and the origin: number of the `file`, number of the `row` in it, `piece` of a
        raw text. Without tokens, `error` says what is wrong with the row, or it has nothing to train.

    Raises:
        PaCAError: A source cannot be read, or its rows fit no format.
    """
    directory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "paca_lightning"
    settings = [
        _VERSION,
        tokenizers.__version__,
        transformers.__version__,
        [source.fingerprint() for source in rows.sources],
        [rows.format, rows.rows.start, rows.rows.stop],
        [encode.text_column, encode.tree_paths],
        tokenizer_fingerprint(encode.encoder.tokenizer),
        [encode.encoder.max_length, encode.encoder.loss_on],
    ]
    build = partial(_build, rows=rows, encode=encode, num_proc=num_proc, name=name)
    files = cached_files(directory, Hasher.hash(settings), build)
    return datasets.concatenate_datasets([Dataset.from_file(str(file)) for file in files])


def _build(directory: Path, rows: Rows, encode: DocumentEncoder, num_proc: int | None, name: str) -> None:
    """Write the documents as Arrow files."""
    scratch = directory / "records.arrow"
    read = _written_records(rows, encode.text_column, scratch, name)
    processes = num_proc or min(_cores(), len(read) // _RECORDS_PER_PROCESS)
    try:
        read.with_format("arrow").map(
            partial(_encode_batch, encode=encode),
            batched=True,
            remove_columns=read.column_names,
            features=_DOCUMENTS,
            num_proc=min(processes, len(read)) if processes > 1 else None,
            cache_file_name=str(directory / "documents.arrow"),
            new_fingerprint="documents",
            desc=f"Tokenizing {name}",
        )
    except Exception as error:
        stop = error.__context__
        if isinstance(stop, KeyboardInterrupt | SystemExit):  # `datasets` waits for its processes then, and fails
            raise stop from None
        if not isinstance(error, RuntimeError) or "subprocess" not in str(error):
            raise
        raise PaCAError(
            f"A process that tokenizes {name} died ({error}); was memory short? Set num_proc to less than {processes}."
        ) from error
    scratch.unlink()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _written_records(rows: Rows, text_column: str, file: Path, name: str) -> Dataset:
    """The records as memory-mapped Arrow: a cheap pass, which leaves all that is costly to the processes."""
    found = rows.records(text_column)
    schema = _RECORDS.arrow_schema
    with pa.ipc.new_stream(str(file), schema) as stream, tqdm(desc=f"Reading {name}", unit=" rows") as progress:
        while columns := _read_batch(found):
            stream.write_batch(pa.RecordBatch.from_pylist(columns, schema))
            progress.update(len(columns))
    return Dataset.from_file(str(file))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's cyclic garbage collector off: it would look through every object of the process again and again.

    A batch makes many objects and few cycles, which are collected after it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def _read_batch(found: Iterator[tuple[int, Record]]) -> list[dict[str, Any]]:
    return [_as_columns(*record) for record in islice(found, _RECORDS_PER_BATCH)]


def _as_columns(file: int, record: Record) -> dict[str, Any]:
    content, error = None, record.error
    if error is None:
        try:
            content = to_json(record.content)
        except PaCAError as mistake:
            error = str(mistake)
    return {"content": content, "error": error, "format": record.format, "file": file, "row": record.row}


@_collector_paused()
def _encode_batch(batch: pa.Table, encode: DocumentEncoder) -> pa.Table:
    found = [
        (row["file"], Record(row["row"], row["format"], from_json(row["content"] or "null"), row["error"]))
        for row in batch.to_pylist()
    ]
    return document_table(list(encode(found)))


def document_table(documents: list[Document]) -> pa.Table:
    """The documents as columns, see `tokenized`."""
    encoded = [document.encoded for document in documents]
    lengths = np.array([len(one.input_ids) for one in encoded], dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int32)
    ids = np.concatenate([NOTHING.input_ids, *(one.input_ids for one in encoded)])
    trained = np.concatenate([NOTHING.trained, *(one.trained for one in encoded)])
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, ids),
        "trained": pa.ListArray.from_arrays(offsets, trained),
        "length": lengths,
        "trained_length": [int(one.trained.sum()) for one in encoded],
        "truncated": [one.truncated for one in encoded],
        **{
            name: [getattr(document, name) for document in documents]
            for name in ("file", "row", "piece", "error", "format", "unread", "remarks", "chosen_length")
        },
    }
    schema = _DOCUMENTS.arrow_schema.remove_metadata()
    return pa.table({name: columns[name] for name in _DOCUMENTS}, schema=schema)
