"""Checksums of whole files, in a JSON file beside them: of sharded checkpoints, and of exports' weights."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.reading import read_json_file

CHECKSUMS = "checksums.json"
PIECE = 2**18
"""Bytes of a file in memory at a time: as many as stay in a core's cache until they are hashed."""


def file_checksum(path: Path) -> str | None:
    """XXH3 with 128 bits of a file's bytes, as 32 hexadecimal digits; None if it cannot be read."""
    hashed, piece = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(piece):
                hashed.update(piece[:count])
    except OSError:
        return None
    return hashed.hexdigest()


def shared_checksums(directory: Path, names: Iterable[str]) -> dict[str, str | None]:
    """The checksums of files that all ranks see, each file hashed by one rank. Collective: call it on every rank.

    Args:
        directory: Of the files.
        names: The same on every rank.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {name: file_checksum(directory / name) for name in names}
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = {name: file_checksum(directory / name) for name in sorted(names)[rank::count]}
    ranks: list[dict[str, str | None]] = [{}] * count
    torch.distributed.all_gather_object(ranks, own)
    return {name: value for sums in ranks for name, value in sums.items()}


def write_checksums(directory: Path, sums: Mapping[str, str | None]) -> None:
    """Write the checksums of a directory's files beside them.

    Raises:
        PaCAError: If a file could not be read.
    """
    if missing := [name for name, value in sums.items() if value is None]:
        raise PaCAError(f"{str(directory / missing[0])!r} cannot be read back, so it was not saved.")
    text = json.dumps({"algorithm": "xxh3_128", "files": dict(sorted(sums.items()))}, indent=2)
    (directory / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def read_checksums(directory: Path) -> dict[str, str] | None:
    """What :func:`write_checksums` wrote; None if nothing.

    Raises:
        PaCAError: If it is damaged.
    """
    path = directory / CHECKSUMS
    try:
        content = read_json_file(path)
        sums = {str(name): str(value) for name, value in content["files"].items()}
        if any(Path(name).name != name for name in sums):
            raise ValueError("it names files of other directories")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PaCAError(f"{path} is damaged ({type(error).__name__}: {error}). Use another copy.") from error
    return sums


def check_checksums(directory: Path, saved: Mapping[str, str], found: Mapping[str, str | None]) -> None:
    """Compare checksums with those that were saved.

    Raises:
        PaCAError: Naming the files that changed or are gone.
    """
    if changed := [name for name, value in saved.items() if found.get(name) != value]:
        gone = "is gone or cannot be read" if found.get(changed[0]) is None else "is not what was saved"
        raise PaCAError(
            f"{str(directory / changed[0])!r} {gone} ({len(changed)} of {len(saved)} files differ from {CHECKSUMS}): "
            f"it was damaged or changed since. Use another copy. If you changed it on purpose, remove {CHECKSUMS}."
        )


def seal_weights(directory: Path) -> None:
    """Write the checksums of the safetensors files of an export beside them.

    Raises:
        PaCAError: If one cannot be read back.
    """
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    write_checksums(directory, {name: file_checksum(directory / name) for name in names})


def check_weights(directory: Path) -> None:
    """Compare the weights of an export with their checksums, if it has some. Each process reads all of them.

    Raises:
        PaCAError: Naming the files that changed or are gone.
    """
    if (saved := read_checksums(directory)) is not None:
        check_checksums(directory, saved, {name: file_checksum(directory / name) for name in saved})
