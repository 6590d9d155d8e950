"""Writing files so that nothing is lost: aside first, then renamed."""

import os
import shutil
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
        PaCAError: Naming the directory and the cause.
    """
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
        PaCAError: If the directory cannot be written.
    """
    check_writable(directory, "output directory")
    destination = Path(directory)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # A rename needs one file system. An existing directory may be a mount, so the scratch directory lies inside it.
    beside = destination if destination.exists() else destination.parent
    scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=beside))
    try:
        yield scratch
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
    """A temporary path beside ``path`` that takes its place at the end, unless there is an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
