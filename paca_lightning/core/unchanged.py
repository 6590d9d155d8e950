"""Files that stay the same while they are read: a base model that is replaced meanwhile would be a mix of two."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from paca_lightning.core.errors import PaCAError


class Stamp(NamedTuple):
    """What changes when a file is written, or another one takes its name."""

    device: int
    inode: int
    size: int
    modified: int
    """In nanoseconds."""

    @classmethod
    def of(cls, path: Path) -> "Stamp | None":
        """The stamp of a file; None if there is none."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def stamps(directory: Path, patterns: Sequence[str]) -> dict[Path, Stamp | None]:
    """The stamp of each file in a directory whose name matches a pattern."""
    return {path: Stamp.of(path) for pattern in patterns for path in sorted(directory.glob(pattern))}


def check_unchanged(before: Mapping[Path, Stamp | None], now: Mapping[Path, Stamp | None]) -> None:
    """Compare files with what they were.

    Raises:
        PaCAError: Naming the first that differs.
    """
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            raise PaCAError(
                f"{str(path)!r} changed while the model was read, so its weights may be a mix of two models. Wait "
                "until whatever writes there (a download, a copy, an export) is done, and start again."
            )


@contextmanager
def unchanged(directory: Path, patterns: Sequence[str]) -> Iterator[None]:
    """Inside, files of a directory are read that must not change.

    Args:
        directory: One that does not exist has no files.
        patterns: Of names, such as ``*.safetensors``.

    Raises:
        PaCAError: At the end, also in place of an error of the reader, if one changed, came or went.
    """
    before = stamps(directory, patterns)
    try:
        yield
    except Exception as error:
        try:
            check_unchanged(before, stamps(directory, patterns))
        except PaCAError as change:
            raise change from error
        raise
    check_unchanged(before, stamps(directory, patterns))
