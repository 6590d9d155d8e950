"""Reading files that others wrote: regular files of a plausible size, in their place, and JSON of a bounded depth."""

import json
import re
import stat
from pathlib import Path
from typing import Any

from paca_lightning.core.errors import PaCAError

JSON_BYTES = 64 * 2**20
JSON_DEPTH = 100
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def check_file(path: Path, largest: int) -> None:
    """Raise unless a path is a regular file of a plausible size that lies in its directory.

    A link may lead to another place in the directory, or to the ``blobs`` of the Hugging Face cache it is part of.

    Args:
        path: A file of an artefact.
        largest: Plausible size in bytes.

    Raises:
        PaCAError: If it is a FIFO, a device or a directory, too large, or a link that leads elsewhere.
        OSError: If it does not exist or cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise PaCAError(f"{path} is no regular file. Replace it with a copy of what was saved.")
    if status.st_size > largest:
        raise PaCAError(f"{path} has {status.st_size:,} bytes, and at most {largest:,} are plausible. It is damaged.")
    directory, target = path.parent.resolve(), path.resolve()
    cache = next((parent.parent for parent in directory.parents if parent.name == "snapshots"), None)
    places = [directory, *([] if cache is None else [cache / "blobs"])]
    if not any(target.is_relative_to(place) for place in places):
        raise PaCAError(f"{path} is a link that leads out of its directory, to {target}. Copy the file into it.")


def read_json_file(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        PaCAError: As :func:`check_file`.
        ValueError: If it is not UTF-8, no JSON, nested too deeply, or has a key twice.
        OSError: If it cannot be read.
    """
    check_file(path, JSON_BYTES)
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """A value from JSON that is nested at most 100 deep, has no key twice, and neither NaN nor Infinity.

    Raises:
        ValueError: If it is something else.
    """
    depth = 0
    for match in _STRUCTURE.finditer(text):
        depth += (match[0] in ("[", "{")) - (match[0] in ("]", "}"))
        if depth > JSON_DEPTH:
            raise ValueError(f"it is nested more than {JSON_DEPTH} deep")
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refused)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key stands twice in the object with the keys {sorted(found)[:5]}")
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
