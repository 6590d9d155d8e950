"""Streams a JSON list element by element, without loading the whole file."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 20


def iterate(stream: BinaryIO) -> Iterator[tuple[Any, str]]:
    """Yield each element of a JSON list, and its text.

    Bytes that are not UTF-8 become lone surrogates, so that the caller can name the element.

    Raises:
        json.JSONDecodeError: At the element, or the comma or bracket after it, that is malformed or missing.
    """
    text = _Text(stream)
    text.take("[")
    if text.peek() == "]":
        return
    while True:
        yield text.value()
        if text.peek() == "]":
            return
        text.take(",")


class _Text:
    """The unparsed rest of a text, read in pieces as needed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._decoder = json.JSONDecoder()
        self._pieces = _pieces(stream)
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
                value, end = self._decoder.raw_decode(self._rest)
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


def _pieces(stream: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    while chunk := stream.read(_CHUNK_BYTES):
        if piece := decoder.decode(chunk):  # empty if a chunk ends within its first character
            yield piece
    if tail := decoder.decode(b"", final=True):
        yield tail
