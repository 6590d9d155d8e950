"""Readers of the file formats that MMLU comes in: each yields the fields and the place of every row."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from paca_lightning.errors import PaCAError

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its fields."""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file (.csv, .parquet, .json, .jsonl) or of one data set saved with ``save_to_disk``.

    Raises:
        PaCAError: If it is of another kind or cannot be read.
    """
    read = _saved_rows if path.is_dir() else _READERS.get(path.suffix)
    if read is None:
        raise PaCAError(f"{path}: questions are read from {', '.join(_READERS)} files and saved data sets.")
    try:
        for number, fields in enumerate(read(path), start=1):
            yield f"{path}, row {number}", fields
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise PaCAError(f"{path} could not be read: {error}") from error


def _saved_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.Dataset):
        raise PaCAError(f"{path} holds several splits, {sorted(saved)}. Name the folder of one of them.")
    return saved


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of the original files, which have no header: question, four choices, answer."""
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 6:
                raise PaCAError(
                    f"{path}, row {number}: {len(row)} columns, where the question, four choices and the answer "
                    "(A, B, C or D) make six."
                )
            yield {"question": row[0], "choices": row[1:5], "answer": row[5]}


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for batch in parquet.ParquetFile(path).iter_batches():
        for fields in batch.to_pylist():
            # The hub's auxiliary_train files nest their columns in one called "train".
            yield fields["train"] if set(fields) == {"train"} else fields


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise PaCAError(f"{path} must hold a list of questions, not a {type(rows).__name__}.")
    return map(_object, (f"{path}, row {number}" for number in range(1, len(rows) + 1)), rows)


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise PaCAError(f"{path}, row {number}: not JSON: {error}") from error
            yield _object(f"{path}, row {number}", fields)


def _object(where: str, fields: object) -> Mapping[str, Any]:
    if not isinstance(fields, dict):
        raise PaCAError(f"{where}: must be an object with question, choices and answer, not {fields!r}.")
    return fields


_READERS: dict[str, Callable[[Path], Iterable[Mapping[str, Any]]]] = {
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
}
