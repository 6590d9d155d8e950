"""Writing files so that nothing is lost: aside first, on the disk, then renamed."""

import glob
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from paca_lightning.core.errors import PaCAError


def check_writable(directory: str | os.PathLike[str], purpose: str) -> None:
    """Raise unless a directory can be written, or created; leaves no trace.

    Args:
        directory: Need not exist yet.
        purpose: What it is for, for the message.

    Raises:
        PaCAError: Naming the directory and the cause; also if it is a URL.
    """
    if "://" in str(directory):
        raise PaCAError(f"{purpose}: {str(directory)!r} is a URL, but must be a directory of this machine.")
    existing = Path(directory).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PaCAError(
            f"{purpose}: {str(directory)!r} cannot be written ({error.strerror} at {str(existing)!r}). Choose another "
            "directory."
        ) from error


def check_writable_if_local(location: str | os.PathLike[str], purpose: str) -> None:
    """Raise unless a location can be written; one with a protocol (``s3://...``) is left to whoever writes there.

    Raises:
        PaCAError: As :func:`check_writable`.
    """
    if "://" not in str(location):
        check_writable(location, purpose)


@contextmanager
def written_aside(directory: str | os.PathLike[str], supersedes: Sequence[str] = ()) -> Iterator[Path]:
    """A scratch directory whose files move to ``directory`` when the block succeeds, and are deleted when it fails.

    A new directory appears complete, in one rename. In one that exists, each file is replaced in one rename, and other
    files stay.

    Args:
        directory: The destination.
        supersedes: Patterns of names, such as ``*.safetensors``. Files of an existing directory that match one, and
            were not written now, are removed at the end: a reader would mix them up with the new ones.

    Raises:
        PaCAError: If the directory cannot be written, or the disk fails or is full.
    """
    check_writable(directory, "output directory")
    destination = Path(directory)
    with told_if_the_disk_fails(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        # A rename needs one file system. An existing directory may be a mount, so the scratch directory lies inside it.
        beside = destination if destination.exists() else destination.parent
        _remove_leftovers(beside, destination.name)
        scratch = Path(tempfile.mkdtemp(prefix=f"{_aside(destination.name)}.", dir=beside))
        with _moved_at_the_end(scratch, destination, supersedes):
            yield scratch


@contextmanager
def _moved_at_the_end(scratch: Path, destination: Path, supersedes: Sequence[str]) -> Iterator[None]:
    try:
        yield
        for file in scratch.rglob("*"):
            if file.is_file():
                _to_disk(file)
        scratch.chmod(0o777 & ~_umask())
        for file in scratch.iterdir():  # some libraries write through temporary files that only their owner may read
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
        if destination.exists():
            written = {file.name for file in scratch.iterdir()}
            for name in written:
                if (scratch / name).is_dir():  # a rename replaces an empty directory only
                    shutil.rmtree(destination / name, ignore_errors=True)
                (scratch / name).replace(destination / name)
            for file in [file for pattern in supersedes for file in destination.glob(pattern)]:
                if file.name not in written:
                    file.unlink()
        else:
            scratch.rename(destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place at the end, unless there is an error. Parents are created.

    Raises:
        PaCAError: If the disk fails or is full.
    """
    with told_if_the_disk_fails(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent, path.name)
        temporary = path.with_name(f"{_aside(path.name)}{path.suffix}")
        try:
            yield temporary
            _to_disk(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def told_if_the_disk_fails(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an error of the disk becomes a PaCAError about what is written.

    Raises:
        PaCAError: If the disk is full, over its quota, read-only, gone, ...
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PaCAError) or (cause := disk_error(error)) is None:
            raise
        raise PaCAError(
            f"{str(path)!r} could not be written: {cause}. What was there before is unchanged. Free space, or choose "
            "another directory."
        ) from error


def disk_error(error: BaseException) -> str | None:
    """What the operating system says, if an error is one of a disk; None for any other.

    The libraries in Rust (safetensors, tokenizers) have it in their message only. PyTorch raises a RuntimeError of its
    own while the system's is handled.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return str(seen)
        if (number := re.search(r"\(os error (\d+)\)", str(seen))) is not None:
            return os.strerror(int(number[1]))
        seen = seen.__cause__ or (seen.__context__ if isinstance(seen, RuntimeError) else None)
    return None


def _aside(name: str) -> str:
    """How the temporary file or directory for a name begins: hidden, and with the process that writes it."""
    return f".{name}.{socket.gethostname()}.{os.getpid()}"


def _remove_leftovers(directory: Path, name: str) -> None:
    """Remove what killed processes of this host left of a name, which would fill the disk kill by kill."""
    beginning = f".{name}.{socket.gethostname()}."
    for left in directory.glob(f".{glob.escape(name)}.*") if directory.is_dir() else ():
        process = left.name.removeprefix(beginning).partition(".")[0]
        if left.name.startswith(beginning) and process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _to_disk(file: Path) -> None:
    """Wait until a file is on the disk: some file systems tell only now that it is full or over its quota."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
