"""Reads rows of texts and labels, of one split, and collects what is wrong with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.fields import Row, checked_text, kind
from paca_lightning.tasks.data.locations import locate
from paca_lightning.tasks.data.mixture import OnBadRow
from paca_lightning.tasks.data.records import WHOLE_FILE, Source, with_place
from paca_lightning.tasks.data.report import SplitReport


@dataclass
class TextRows:
    """The rows of a split with their places, and what is wrong with others.

    Attributes:
        location: Where they come from, in words.
        rows: The rows that can be read.
        places: File and number of each, as messages begin with them.
        bad: What is wrong with the others, and where.
        bad_files: How many of those are files that break off.
    """

    location: str
    rows: list[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    bad_files: int = 0

    def replace(self, parse: Callable[[Any], Any]) -> None:
        """Put what a function makes of a row into its place. Rows for which it raises a PaCAError join the bad ones."""
        kept = []
        for row, place in zip(self.rows, self.places, strict=True):
            try:
                kept.append((parse(row), place))
            except PaCAError as error:
                self.bad.append(f"{place}: {error}")
        self.rows, self.places = [row for row, _ in kept], [place for _, place in kept]

    def check(self, on_bad_row: OnBadRow) -> None:
        """Raise if rows cannot be used.

        Raises:
            PaCAError: That lists them, unless they may be dropped and others are left.
        """
        if self.bad and (on_bad_row == "error" or self.bad_files or not self.rows):
            raise PaCAError(SplitReport(self.bad, self.bad_files).bad_row_list(self.location))


def read_text_rows(
    location: str | list[str], *, split: str = "train", subset: str | None = None, cache_dir: str | None = None
) -> TextRows:
    """Read the rows of a split: JSON, JSON Lines, CSV, TSV or Parquet files, or a data set.

    Args:
        location: A file, a directory, a pattern, a saved data set, a hub id, or a list of them.
        split: Split of a hub id or a saved data set.
        subset: Configuration name of a hub data set.
        cache_dir: Where `datasets` keeps downloads.

    Raises:
        PaCAError: A source is missing.
    """
    locations = locate(location)
    named = locations[0] if len(locations) == 1 else f"{len(locations)} files ({locations[0]}, ...)"
    result = TextRows(named)
    for one in locations:
        for number, row in Source(one, split, subset, cache_dir, tables=True).read():
            if isinstance(row, PaCAError):
                result.bad.append(with_place(str(row), one, number))
                result.bad_files += number == WHOLE_FILE
            else:
                result.rows.append(row)
                result.places.append(f"{one}, row {number}")
    return result


def texts_of(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """The texts of a row.

    Raises:
        PaCAError: A column is missing, is no text, or is empty.
    """
    return tuple(_text(row, column) for column in columns)


def words_of(row: Row, column: str) -> list[str]:
    """The words of a row.

    Raises:
        PaCAError: The column is missing, or is no list of texts, or is empty.
    """
    words = value_of(row, column)
    if not isinstance(words, list) or not words:
        raise PaCAError(f"the field '{column}' is {kind(words)}, expected a list of words, at least one")
    return [checked_text(word, f"{column}[{number}]") for number, word in enumerate(words)]


def value_of(row: Row, column: str) -> Any:
    """A field of a row.

    Raises:
        PaCAError: The row has no such field.
    """
    if column not in row:
        raise PaCAError(f"the field '{column}' is missing; the row has {', '.join(map(repr, row)) or 'no fields'}")
    return row[column]


def _text(row: Row, column: str) -> str:
    text = checked_text(value_of(row, column), column)
    if not text.strip():
        raise PaCAError(f"the field '{column}' is empty")
    return text
