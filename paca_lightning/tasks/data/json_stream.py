"""Streams the values of a JSON text one by one, without loading the whole file."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from paca_lightning.core.errors import PaCAError

CHUNK_BYTES = 1 << 20


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text.

    Raises:
        PaCAError: If a key is there twice: ``json`` would take the last value, and forget the others in silence.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise PaCAError(f"has the key {twice!r} more than once in one object. Which value is meant?")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_with_each_key_once)


def elements(stream: BinaryIO, encoding: str = "utf-8") -> Iterator[tuple[Any, str]]:
    """Yield each element of a JSON list, and its text.

    Bytes that cannot be decoded become lone surrogates, so that the caller can name the element.

    Raises:
        json.JSONDecodeError: At the element, or the comma or bracket after it, that is malformed or missing; or if
            anything follows the list.
    """
    text = _Text(stream, encoding)
    text.take("[")
    while text.peek() != "]":
        yield text.value()
        if text.peek() != "]":
            text.take(",")
    text.take("]")
    if rest := text.peek():
        raise json.JSONDecodeError(
            f"After the end of the list the file goes on with {rest!r}; were two files joined?", rest, 0
        )


def values(stream: BinaryIO, encoding: str = "utf-8") -> Iterator[tuple[Any, str]]:
    """Yield each of the JSON values that follow one another, and its text; as `elements`."""
    text = _Text(stream, encoding)
    while text.peek():
        yield text.value()
        if text.peek() == ",":
            raise json.JSONDecodeError("A comma precedes it, as in a list, but the file does not begin with '['", "", 0)


class _Text:
    """The unparsed rest of a text, read in pieces as needed."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._pieces = _pieces(stream, encoding)
        self._rest = next(self._pieces, "").removeprefix("\ufeff")

    def peek(self) -> str:
        """The next non-white-space character; empty at the end."""
        self._rest = self._rest.lstrip()
        while not self._rest and (piece := next(self._pieces, "")):
            self._rest = piece.lstrip()
        return self._rest[:1]

    def take(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise json.JSONDecodeError(
                f"Expected {character!r}, found {found or 'the end of the file'!r}", self._rest, 0
            )
        self._rest = self._rest[1:]

    def value(self) -> tuple[Any, str]:
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._rest)
            except json.JSONDecodeError:
                # Double the text, so that a long element is decoded a logarithmic number of times.
                if not self._read(len(self._rest)):
                    raise
                continue
            if end == len(self._rest) and self._read(1):
                continue  # a number may continue
            text, self._rest = self._rest[:end], self._rest[end:]
            return value, text

    def _read(self, characters: int) -> bool:
        pieces: list[str] = []
        while sum(map(len, pieces)) < max(characters, 1) and (piece := next(self._pieces, "")):
            pieces.append(piece)
        self._rest += "".join(pieces)
        return bool(pieces)


def _pieces(stream: BinaryIO, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    while chunk := stream.read(CHUNK_BYTES):
        if piece := decoder.decode(chunk):  # empty if a chunk ends within its first character
            yield piece
    if tail := decoder.decode(b"", final=True):
        yield tail
