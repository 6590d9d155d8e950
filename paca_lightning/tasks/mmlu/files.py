"""Readers of the file formats of MMLU. Each yields the origin and the fields of every row."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.records import Source

Row = tuple[str, Mapping[str, Any]]
"""Origin of a row, for messages, and its fields."""


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of one file (CSV like the original ones, JSON, JSON Lines, Parquet) or of one saved data set.

    Raises:
        PaCAError: If the file is of another kind, empty or unreadable.
    """
    for number, fields in _csv_rows(path) if path.suffix == ".csv" else Source(str(path)).rows():
        nested = fields.get("train")  # as in the hub's auxiliary_train files
        yield f"{path}, row {number}", nested if isinstance(nested, dict) else fields


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of the original files, which have no header: question, four choices, answer."""
    number = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if len(row) != 6:
                    raise PaCAError(
                        f"{path}, row {number}: {len(row)} columns, where the question, four choices and the answer "
                        "(A, B, C or D) make six."
                    )
                yield number, {"question": row[0], "choices": row[1:5], "answer": row[5]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PaCAError(f"{path}, after row {number}: cannot be read ({error}).") from error
    if number == 0:
        raise PaCAError(f"{path}: has no rows. Get it again, or leave it out.")
