"""Reads the rows of a CSV or TSV file, whose first line names the columns."""

import csv
from collections.abc import Iterator
from pathlib import Path

from paca_lightning.core.errors import PaCAError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""What separates the values of a table, by the file's suffix."""


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str] | PaCAError]]:
    """Yield (row, values), or what is wrong with a row. The first row below the names is number 1.

    Args:
        path: A file in UTF-8, with or without a byte order mark.

    Raises:
        PaCAError: The file breaks off inside quotes, or names a column twice.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
        try:
            names = next(rows, [])
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise PaCAError(f"line 1: names the column {twice[0]!r} more than once.")
            for number, values in enumerate(rows, start=1):
                if len(values) == len(names):
                    yield number, dict(zip(names, values, strict=True))
                elif values:  # not a blank line
                    yield number, PaCAError(f"has {len(values)} values, and the first line names {len(names)} columns")
        except csv.Error as error:
            raise PaCAError(f"line {rows.line_num}: is not valid CSV ({error}).") from error
