"""Finds the data files of a location: a file, a directory of files, or a pattern."""

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ReadInstruction

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import looks_local, where_it_was_sought

DATA_SUFFIXES = {".json", ".jsonl", ".ndjson", ".gz", ".bz2", ".xz", ".zst", ".parquet"}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # what `save_to_disk` writes
_SPLITS = re.compile(r"(?:^|[-_.])(train|valid(?:ation)?|val|dev|eval|test)(?=[-_.])")
_NAMED = 10  # entries of a directory that a message names


def locate(location: str | Sequence[str]) -> list[str]:
    """The files of a location, or the location itself if it is a file, a saved data set or a hub id.

    Args:
        location: A file, a directory of files, a pattern (`shards/*.parquet`), any other location of a `Source`, or a
            list of them. Files of a directory or a pattern come in the order of their names.

    Raises:
        PaCAError: A directory holds files of several splits.
    """
    if not isinstance(location, str):
        if not location:
            raise PaCAError("the list of data files is empty.")
        return [file for one in location for file in locate(one)]
    path = Path(location).expanduser()
    if _is_directory_of_files(path):
        files = [file for file in sorted(path.iterdir()) if _is_data(file)]
        splits = {found[1]: file for file in files if (found := _SPLITS.search(file.name.lower()))}
        if len(splits) > 1:
            raise PaCAError(
                f"{location}: holds files of several splits ({', '.join(sorted(splits))}). Name those of one by a "
                f"pattern, such as {str(path / '*train*')!r}, or {str(splits[min(splits)])!r} itself."
            )
        return [str(file) for file in files] or [location]
    if not path.exists() and glob.has_magic(location):
        return [file for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
    return [location]


def is_missing(location: str) -> bool:
    """Whether a location means a local file that is not there, rather than a URL or a data set of the hub."""
    path = Path(location).expanduser()
    local = path.suffix.lower() in DATA_SUFFIXES or looks_local(location) or "/" not in location
    return local and "://" not in location and not path.exists()


def check_present(*locations: Any) -> None:
    """Check that all files are there, before any is read.

    Args:
        *locations: As for `skipped`, or None.

    Raises:
        PaCAError: Files are missing, or no file matches a pattern; all are named.
    """
    missing = [sentence for location in locations if location is not None for sentence in _missing(location)]
    if len(missing) > 1:
        raise PaCAError(f"{len(missing)} of the data's locations are not there:\n  " + "\n  ".join(missing))
    if missing:
        raise PaCAError(f"{missing[0]}.")


def _missing(location: Any) -> list[str]:
    if isinstance(location, Mapping):
        return _missing(location["location"])
    if not isinstance(location, str):
        return [sentence for one in location for sentence in _missing(one)]
    if glob.has_magic(location) and not Path(location).expanduser().exists():
        absolute = Path(location).expanduser().absolute()
        return [] if locate(location) else [f"{location}: no file matches (looked for {absolute})"]
    return [f"{location}: no such file ({where_it_was_sought(location)})"] if is_missing(location) else []


def skipped(location: Any) -> list[str]:
    """What of the directories of a location is not read, as sentences.

    Args:
        location: As for `locate`, or a mapping with one as `location`.
    """
    if isinstance(location, Mapping):
        return skipped(location["location"])
    if not isinstance(location, str):
        return [sentence for one in location for sentence in skipped(one)]
    path = Path(location).expanduser()
    if not _is_directory_of_files(path) or not (others := describe_directory(path)):
        return []
    return [f"{location}: its JSON and Parquet files are read, but not the other entries{others}."]


def split_and_rows(split: str, default: str, count: Callable[[str], int]) -> tuple[str, slice]:
    """A split such as `train[:100]` or `train[10%:]` as its name and its rows.

    Args:
        split: Name of a split, with or without a slice of whole numbers or percents.
        default: The name if only a slice is given.
        count: Counts the rows of a split, which percents and negative numbers need.

    Raises:
        PaCAError: It is no name or slice.
    """
    found = re.fullmatch(r"([^\[\]]*)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if found is None:
        raise PaCAError(_no_slice(split, default))
    name, start, stop = found.groups()
    name = name or default
    if "-" not in split[len(name) :] and "%" not in split:
        return name, slice(int(start) if start else None, int(stop) if stop else None)
    try:
        instruction = ReadInstruction.from_spec(f"rows[{start or ''}:{stop or ''}]")
        absolute = instruction.to_absolute({"rows": count(name)})[0]
    except (ValueError, AssertionError) as error:
        raise PaCAError(_no_slice(split, default)) from error
    return name, slice(absolute.from_, absolute.to)


def _no_slice(split: str, default: str) -> str:
    return (
        f"The split {split!r} cannot be used: give a name, or a name and rows by whole numbers from 0 or by percents, "
        f"such as '{default}[:100]', '{default}[100:200]' or '{default}[:10%]'."
    )


def describe_directory(path: Path) -> str:
    """The entries of a directory that are not data files, in parentheses; empty if there are none."""
    names = [
        entry.name + "/" * entry.is_dir()
        for entry in sorted(path.iterdir())
        if not entry.name.startswith(".") and not _is_data(entry)
    ]
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(names[:_NAMED])}{more})" if names else ""


def _is_directory_of_files(path: Path) -> bool:
    return path.is_dir() and not any((path / name).exists() for name in _SAVED)


def _is_data(file: Path) -> bool:
    return (
        file.suffix.lower() in DATA_SUFFIXES and not file.is_dir() and not file.name.startswith((".", "dataset_info"))
    )
