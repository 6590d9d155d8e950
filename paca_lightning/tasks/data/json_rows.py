"""Rows of a JSON file: a list, one object a line, or objects one after another. Rows that are broken are named."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, BinaryIO

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data import json_stream
from paca_lightning.tasks.data.fields import kind

_KINDS = "A data file is a JSON list of objects, JSON Lines (one object a line), or Parquet."
_MARKS = (  # by the bytes that a file begins with; the longer ones first
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)
_OTHERS = (  # how other kinds of files begin, as text
    ("PK\3\4", "it is a zip archive, or a table of Excel"),
    ("version https://git-lfs", "it is a pointer of Git LFS: `git lfs pull` fetches the file"),
    ("ARROW1", "it is an Arrow file: give the directory that `save_to_disk` wrote"),
    ("\udcff\udcff\udcff\udcff", "it is an Arrow stream: give the directory that `save_to_disk` wrote"),
)


def read_rows(opened: Callable[[], BinaryIO]) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, value) pairs; the value is a `PaCAError` if the row cannot be read.

    In JSON Lines the number is that of the line.

    Args:
        opened: Opens the file from its start, uncompressed. It is UTF-8, or UTF-16 or UTF-32.

    Raises:
        PaCAError: What follows a row cannot be read either, as in a list that breaks off. The message begins with the
            row's number.
    """
    with opened() as stream:
        head = stream.read(1024)
    encoding = _encoding(head)
    first = head.decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n")[:1]
    if first == "{":
        with opened() as stream:
            joined = _spans_lines(stream, encoding)
    elif first != "[":
        with opened() as stream:
            _check_is_json(stream, encoding)
    with opened() as stream:
        if first == "[":
            yield from _stream_rows(json_stream.elements(stream, encoding))
        elif first == "{" and joined:
            yield from _stream_rows(json_stream.values(stream, encoding))
        else:
            yield from _line_rows(stream, encoding)


def _encoding(head: bytes) -> str:
    """The encoding of a text, by its byte-order mark or, as JSON begins with ASCII, its zero bytes."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if b"\0" in head[:2]:
        return "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
    return "utf-8"


def _lines(stream: BinaryIO, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) pairs, without blank lines. Bytes that are not UTF-8 become lone surrogates."""
    with io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="\n") as text:
        for number, line in enumerate(text, start=1):
            if stripped := line.strip("\ufeff \t\r\n"):  # files that were joined have byte-order marks inside
                yield number, stripped


def _spans_lines(stream: BinaryIO, encoding: str) -> bool:
    """Whether objects span lines, as in pretty-printed JSON, or follow one another in a line."""
    lines = (line for _, line in _lines(stream, encoding))
    first, second = next(lines, ""), next(lines, "")
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        return error.msg == "Extra data" or (bool(second) and not second.startswith("{"))
    except RecursionError:
        pass
    return False


def _check_is_json(stream: BinaryIO, encoding: str) -> None:
    """Check that one of the first two lines is JSON: if none is, the file is of another kind, whatever follows."""
    lines = list(islice(_lines(stream, encoding), 2))
    for _, line in lines:
        with suppress(json.JSONDecodeError):
            json.loads(line)
            return
    if lines:
        number, line = lines[0]
        found = next((name for mark, name in _OTHERS if line.startswith(mark)), f"the file begins with {line[:30]!r}")
        raise PaCAError(
            f'row {number}: is not valid JSON ({found}). {_KINDS} Plain text becomes rows of {{"text": "..."}}, with '
            "`format: text`."
        )


def _line_rows(stream: BinaryIO, encoding: str) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(stream, encoding):
        if "\0" in line:
            yield number, PaCAError("holds NUL bytes, as a crash or a full disk leaves them. Write the file again.")
            continue
        try:
            yield number, _checked(json_stream.DECODER.decode(line), line)
        except PaCAError as error:
            yield number, error
        except json.JSONDecodeError as error:
            yield number, PaCAError(f"is not valid JSON ({error.msg}, column {error.colno}). {_KINDS}")
        except RecursionError:
            yield number, PaCAError("is nested too deeply to be read. A row has a few levels; is the file right?")


def _stream_rows(values: Iterator[tuple[Any, str]]) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        for number, (value, text) in enumerate(values, start=1):
            yield number, _checked(value, text)
    except json.JSONDecodeError as error:
        raise PaCAError(f"row {number + 1}: is not valid JSON ({error.msg}).") from error
    except PaCAError as error:
        raise PaCAError(f"row {number + 1}: {error}") from error
    except RecursionError as error:
        raise PaCAError(f"row {number + 1}: is nested too deeply to be read.") from error


def _checked(value: Any, text: str) -> Any:
    """A row, or what is wrong with it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return PaCAError(f"is not UTF-8 (character {error.start + 1} of the row). Convert the file.")
    return value if isinstance(value, dict) else PaCAError(f"is {kind(value)}, expected an object.")
