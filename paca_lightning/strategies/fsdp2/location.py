"""Where a checkpoint is: a local path, or a URL of any file system that fsspec knows (``s3://``, ``gs://``, ...)."""

import os
from dataclasses import dataclass, replace
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from paca_lightning.core.errors import PaCAError


@dataclass(frozen=True)
class Location:
    """A file or directory in a file system of fsspec.

    Attributes:
        name: An absolute local path, or a URL. PyTorch and fsspec accept both as a string.
        file_system: Its file system.
        is_local: Whether it is in a file system of this host, where a rename is atomic.
    """

    name: str
    file_system: AbstractFileSystem
    is_local: bool

    @classmethod
    def of(cls, location: str | os.PathLike[str]) -> "Location":
        """The location that a path or a URL names.

        Raises:
            PaCAError: If no installed package knows the URL's protocol.
        """
        name = os.fspath(location)
        try:
            file_system, path = url_to_fs(name)
        except (ImportError, ValueError) as error:
            raise PaCAError(f"{name!r} cannot be reached: {error}") from error
        is_local = get_protocol(name) in LocalFileSystem.protocol
        return cls(path if is_local else name.rstrip("/"), file_system, is_local)

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, name: str) -> "Location":
        """A file or directory inside this one."""
        return replace(self, name=f"{self.name}/{name}")

    def beside(self, name: str) -> "Location":
        """A file or directory in the same parent."""
        return replace(self, name=f"{self.name.rpartition('/')[0]}/{name}")

    def is_file(self) -> bool:
        """Whether a file is here."""
        return bool(self.file_system.isfile(self.name))

    def is_directory(self) -> bool:
        """Whether a directory is here."""
        return bool(self.file_system.isdir(self.name))

    def exists(self) -> bool:
        """Whether a file or a directory is here."""
        return bool(self.file_system.exists(self.name))

    def open(self, mode: str) -> IO[Any]:
        """Open the file here."""
        stream: IO[Any] = self.file_system.open(self.name, mode)
        return stream

    def remove(self) -> None:
        """Delete the file or directory here, if there is one."""
        if self.exists():
            self.file_system.rm(self.name, recursive=True)

    def move(self, place: "Location") -> None:
        """Move the directory here to a place where nothing is. Object stores copy each file, and remove it then."""
        self.file_system.mv(self.name, place.name, recursive=True)
