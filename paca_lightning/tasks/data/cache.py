"""A cache of prepared data that runs share: one writes an entry while others wait, and damaged ones are rebuilt."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from paca_lightning.core.files import written_aside

_MANIFEST = "manifest.json"  # size and hash of each file of an entry


def cached_files(directory: Path, key: str, build: Callable[[Path], None]) -> list[Path]:
    """The files of a cache entry, which are written first if there is none, or if one is damaged.

    An entry is a directory that appears complete, in one rename. A lock lets one process at a time write it, on any
    number of machines that share the file system.

    Args:
        directory: The cache; created if it is missing.
        key: Name of the entry: a hash of everything that its content depends on.
        build: Writes the files into an empty directory.
    """
    entry = directory / key
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(entry):
        if (damage := _damage(entry)) is not None:
            if entry.exists():
                rank_zero_warn(f"The cached data in {entry} are damaged ({damage}), and are prepared again.")
            for left in (entry, *directory.glob(f".{key}-*")):  # the latter of processes that were killed
                shutil.rmtree(left, ignore_errors=True)
            with written_aside(entry) as scratch:
                build(scratch)
                files = {file.name: [file.stat().st_size, file_hash(file)] for file in sorted(scratch.iterdir())}
                (scratch / _MANIFEST).write_text(json.dumps(files), encoding="utf-8")
        return [entry / name for name in _manifest(entry)]


def file_hash(path: Path) -> str:
    """A hash of a file's content, which is read once as long as its size and time stay the same."""
    stat = path.stat()
    return _content_hash(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _content_hash(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locked(entry: Path) -> AcquireReturnProxy:
    lock = FileLock(f"{entry}.lock", mode=0o666)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        rank_zero_info(f"Another process prepares the same data in {entry}: waiting for it.")
        return lock.acquire()


def _manifest(entry: Path) -> dict[str, tuple[int, str]]:
    files: dict[str, tuple[int, str]] = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
    return files


def _damage(entry: Path) -> str | None:
    """What is wrong with an entry, in words; None if it is as it was written."""
    try:
        for name, (size, digest) in _manifest(entry).items():
            file = entry / name
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
            if file_hash(file) != digest:
                return f"{name} has another content"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error)
    return None
