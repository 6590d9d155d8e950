"""Streams the rows of a local file, a saved `datasets` directory or a Hugging Face hub data set."""

import glob
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.datasets import fingerprint_of
from paca_lightning.tasks.data import json_list

Row = dict[str, Any]

_SUFFIXES = {".json", ".jsonl", ".ndjson", ".gz", ".parquet"}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # what `save_to_disk` writes
_SPLITS = re.compile(r"(?:^|[-_.])(train|valid(?:ation)?|val|dev|eval|test)(?=[-_.])")


def locate(location: str | Sequence[str]) -> list[str]:
    """The files of a location, or the location itself if it is a file, a saved data set or a hub id.

    Args:
        location: A file, a directory of files, a pattern (`shards/*.parquet`), any other location of a `Source`, or a
            list of them. Files of a directory or a pattern come in the order of their names.

    Raises:
        PaCAError: Nothing matches, or a directory holds files of several splits.
    """
    if not isinstance(location, str):
        if not location:
            raise PaCAError("the list of data files is empty.")
        return [file for one in location for file in locate(one)]
    path = Path(location).expanduser()
    if path.is_dir() and not any((path / name).exists() for name in _SAVED):
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix in _SUFFIXES and not file.name.startswith((".", "dataset_info"))
        )
        splits = {found[1]: file for file in files if (found := _SPLITS.search(file.name.lower()))}
        if len(splits) > 1:
            raise PaCAError(
                f"{location}: holds files of several splits ({', '.join(sorted(splits))}). Name those of one by a "
                f"pattern, such as {str(path / '*train*')!r}, or {str(splits[min(splits)])!r} itself."
            )
        return [str(file) for file in files] or [location]
    if not path.exists() and glob.has_magic(location):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        if not files:
            raise PaCAError(f"{location}: no file matches (looked for {path.absolute()}).")
        return [str(file) for file in files]
    return [location]


@dataclass(frozen=True)
class Source:
    """A file or data set that rows are read from.

    Args:
        location: A local file (JSON list, JSON Lines, either of them gzipped, or Parquet; told apart by content), a
            directory written by `Dataset.save_to_disk`, or a data set id on the Hugging Face hub.
        split: Which split to take from a hub id or a saved `DatasetDict`.
        subset: The hub data set's configuration name.
        cache_dir: Where `datasets` keeps downloads; its own default if None.
    """

    location: str
    split: str = "train"
    subset: str | None = None
    cache_dir: str | None = None

    @property
    def path(self) -> Path:
        """The location as a local path."""
        return Path(self.location).expanduser()

    def fingerprint(self) -> tuple[str, ...]:
        """What changes when the rows change: size and time of a file, or the data set's own fingerprint."""
        if self.path.is_file():
            stat = self.path.stat()
            return str(self.path.resolve()), str(stat.st_size), str(stat.st_mtime_ns)
        return self.location, str(self.subset), self.split, fingerprint_of(self._dataset())

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield (row number from 1, row). For JSON Lines the number is that of the line.

        Raises:
            PaCAError: The source is missing, empty or unreadable, or a row is not an object in valid UTF-8 JSON.
        """
        empty = True
        for number, row in self._file_rows() if self.path.is_file() else enumerate(self._dataset(), start=1):
            if not isinstance(row, dict):
                raise PaCAError(f"{self.location}, row {number}: is a {type(row).__name__}, expected an object.")
            empty = False
            yield number, row
        if empty:
            raise PaCAError(f"{self.location}: has no rows.")

    def _file_rows(self) -> Iterator[tuple[int, Any]]:
        with self.path.open("rb") as file:
            head = file.read(4)
            file.seek(0)
            if head == b"PAR1":
                yield from self._parquet_rows()
                return
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if head[:2] == b"\x1f\x8b" else file
            with self._readable():
                first = _first_character(stream)
                yield from self._list_rows(stream) if first == b"[" else self._line_rows(stream)

    def _parquet_rows(self) -> Iterator[tuple[int, Row]]:
        with self._readable():
            number = 0
            for batch in pq.ParquetFile(self.path).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row

    def _line_rows(self, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise self._not_utf8(number, error.start + 1) from error
            except json.JSONDecodeError as error:
                raise PaCAError(
                    f"{self.location}, row {number}: is not valid JSON ({error.msg}, column {error.colno}). "
                    "A data file is a JSON list of objects, JSON Lines (one object a line), or Parquet."
                ) from error

    def _list_rows(self, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            for number, (row, text) in enumerate(json_list.iterate(stream), start=1):
                text.encode("utf-8")
                yield number, row
        except UnicodeEncodeError as error:
            raise self._not_utf8(number, error.start + 1) from error
        except json.JSONDecodeError as error:
            raise PaCAError(f"{self.location}, row {number + 1}: is not valid JSON ({error.msg}).") from error

    def _not_utf8(self, number: int, position: int) -> PaCAError:
        return PaCAError(
            f"{self.location}, row {number}: is not UTF-8 (character {position} of the row). Convert the file."
        )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, pa.ArrowException) as error:
            raise PaCAError(f"{self.location}: cannot be read ({error}). Is the file complete?") from error

    def _dataset(self) -> datasets.Dataset:
        if self.path.is_dir():
            loaded = self._saved_dataset()
        elif self.path.suffix in _SUFFIXES or self.path.is_absolute() or self.location.count("/") != 1:
            raise PaCAError(f"{self.location}: no such file (looked for {self.path.absolute()}).")
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
                f"{self.location}: is a directory, but not one that `datasets` saved ({error}). "
                "Give a JSON, JSON Lines or Parquet file, a directory of such, or one written by `save_to_disk`."
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


def _first_character(stream: BinaryIO) -> bytes:
    """The first byte that is neither white space nor a byte-order mark; the stream is rewound."""
    first = stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    stream.seek(0)
    return first
