"""Streams the rows of a local file, a saved `datasets` directory or a Hugging Face hub data set."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import where_it_was_sought
from paca_lightning.core.private.datasets import fingerprint_of
from paca_lightning.tasks.data.cache import file_hash
from paca_lightning.tasks.data.fields import Row
from paca_lightning.tasks.data.json_rows import read_rows
from paca_lightning.tasks.data.locations import describe_directory, is_missing
from paca_lightning.tasks.data.table_rows import DELIMITERS, read_table

_TABLES = {
    ".csv": "read_csv({}, dtype=str)",
    ".tsv": "read_csv({}, dtype=str, sep='\\t')",
    ".xlsx": "read_excel({}, dtype=str)",
    ".xls": "read_excel({}, dtype=str)",
}
"""Endings of tables, and how pandas reads them."""


WHOLE_FILE = 0
"""Number of a row that stands for the rest of its file: its error has the place in it."""


def with_place(error: str, location: str, number: int) -> str:
    """What is wrong with a row, with its place."""
    return error if number == WHOLE_FILE else f"{location}, row {number}: {error}"


@dataclass(frozen=True)
class Source:
    """A file or data set that rows are read from.

    Args:
        location: A local file (JSON list, JSON Lines or Parquet, told apart by content; JSON may be compressed by gzip,
            bzip2, xz or Zstandard), a directory written by `Dataset.save_to_disk`, or a data set id on the hub.
        split: Which split to take from a hub id or a saved `DatasetDict`.
        subset: The hub data set's configuration name.
        cache_dir: Where `datasets` keeps downloads; its own default if None.
        tables: Whether rows may be those of a CSV or TSV file, all of whose values are texts.
    """

    location: str
    split: str = "train"
    subset: str | None = None
    cache_dir: str | None = None
    tables: bool = False

    @property
    def path(self) -> Path:
        """The location as a local path."""
        return Path(self.location).expanduser()

    def fingerprint(self) -> tuple[str, ...]:
        """What changes when the rows change: a hash of the file's content, or the data set's own fingerprint."""
        if self.path.is_file():
            with self._readable():
                return ("file", file_hash(self.path))
        return self.location, str(self.subset), self.split, fingerprint_of(self._dataset())

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield (row number from 1, row). For JSON Lines the number is that of the line.

        Raises:
            PaCAError: The source is missing, empty or unreadable, or a row is not an object in valid JSON.
        """
        for number, row in self.read():
            if isinstance(row, PaCAError):
                raise PaCAError(with_place(str(row), self.location, number)) from row
            yield number, row

    def read(self) -> Iterator[tuple[int, Row | PaCAError]]:
        """Yield rows as `rows` does; for a row that cannot be read, what is wrong with it, without its place.

        A file that is empty or cannot be read to its end has a last row of number `WHOLE_FILE`.

        Raises:
            PaCAError: The source is missing, or is no file and cannot be read.
        """
        rows = self._file_rows() if self.path.is_file() else enumerate(self._dataset(), start=1)
        try:
            first = next(rows, None)
            if first is None:
                raise PaCAError(f"{self.location}: has no rows.")
            yield from chain([first], rows)
        except PaCAError as error:
            if not self.path.is_file():
                raise
            yield WHOLE_FILE, error

    def _file_rows(self) -> Iterator[tuple[int, Any]]:
        if self.tables and self.path.suffix.lower() in DELIMITERS:
            with self._readable():
                yield from self._table_rows()
            return
        if reading := _TABLES.get(self.path.suffix.lower()):
            raise PaCAError(
                f"{self.location}: is a table, and conversations are read from JSON and Parquet. Convert it: "
                f"`pandas.{reading.format(repr(self.location))}.to_json('rows.jsonl', orient='records', lines=True)`."
            )
        with self._readable():
            with self.path.open("rb") as file:
                parquet = file.read(4) == b"PAR1"
            try:
                yield from self._parquet_rows() if parquet else read_rows(self._open)
            except UnicodeDecodeError as error:
                raise PaCAError(f"{self.location}: is not {error.encoding.upper()} ({error.reason}).") from error
            except PaCAError as error:
                raise PaCAError(f"{self.location}, {error}") from error

    def _table_rows(self) -> Iterator[tuple[int, Any]]:
        try:
            yield from read_table(self.path)
        except UnicodeDecodeError as error:
            raise PaCAError(f"{self.location}: is not UTF-8 ({error.reason}).") from error
        except PaCAError as error:
            raise PaCAError(f"{self.location}, {error}") from error

    def _open(self) -> BinaryIO:
        """The file, uncompressed; the kind of compression is told by its first bytes."""
        with self.path.open("rb") as file:
            head = file.read(6)
        if head.startswith(b"\x1f\x8b"):
            return cast(BinaryIO, gzip.open(self.path))
        if head.startswith(b"BZh"):
            return cast(BinaryIO, bz2.open(self.path))
        if head.startswith(b"\xfd7zXZ\x00"):
            return cast(BinaryIO, lzma.open(self.path))
        if head.startswith(b"\x28\xb5\x2f\xfd"):
            return cast(BinaryIO, pa.CompressedInputStream(str(self.path), "zstd"))
        return self.path.open("rb")

    def _parquet_rows(self) -> Iterator[tuple[int, Row]]:
        number = 0
        for batch in pq.ParquetFile(self.path).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
            raise PaCAError(f"{self.location}: cannot be read ({error}). Is the file complete?") from error

    def _dataset(self) -> datasets.Dataset:
        if self.path.is_dir():
            loaded = self._saved_dataset()
        elif "://" in self.location:
            raise PaCAError(f"{self.location}: is a URL, which is not read. Download the file and give its path.")
        elif is_missing(self.location):
            raise PaCAError(f"{self.location}: no such file ({where_it_was_sought(self.location)}).")
        else:
            loaded = self._hub_dataset()
        if isinstance(loaded, datasets.DatasetDict):
            if self.split not in loaded:
                raise PaCAError(f"{self.location}: has no split {self.split!r}; it has {', '.join(map(repr, loaded))}.")
            loaded = loaded[self.split]
        return loaded

    def _saved_dataset(self) -> datasets.Dataset | datasets.DatasetDict:
        try:
            return datasets.load_from_disk(str(self.path))
        except Exception as error:
            raise PaCAError(
                f"{self.location}: is a directory, but not one that `datasets` saved ({error}), and it holds no data "
                f"files{describe_directory(self.path)}. Give a JSON, JSON Lines or Parquet file, a directory of such, "
                "or one written by `save_to_disk`."
            ) from error

    def _hub_dataset(self) -> datasets.Dataset:
        try:
            return datasets.load_dataset(self.location, self.subset, split=self.split, cache_dir=self.cache_dir)
        except Exception as error:
            raise PaCAError(
                f"{self.location}: is not a local file, and the hub data set (split {self.split!r}) cannot be loaded: "
                f"{error}. Offline, give a local file, or a directory written on a connected machine by "
                f"`datasets.load_dataset({self.location!r}).save_to_disk(DIRECTORY)`."
            ) from error
