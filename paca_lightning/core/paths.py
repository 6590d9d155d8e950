"""Paths of modules, without the segments that wrappers add; and which names are paths of this machine."""

import re
from pathlib import Path

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import WRAPPER_SEGMENTS

MATCH_SECONDS = 0.5
"""Of CPU time for one pattern on one path, which takes microseconds unless the pattern backtracks without end."""

EXPERT_COLUMNS = "paca_columns_of_"
"""Begins the name of a layer beside a stacked parameter of experts. Its path is that of the parameter, without this."""

LOCAL_FOLDERS = ("adapters", "checkpoints", "configs", "data", "datasets", "models", "output", "outputs", "runs")
"""Folders of projects, as ours has them: ``models/tiny`` is a path, though it is spelled as the hub's owner/name."""


def clean_path(path: str) -> str:
    """A module's path without the segments that wrappers add. Of experts' columns, it is the parameter's path."""
    segments = (segment.removeprefix(EXPERT_COLUMNS) for segment in path.split("."))
    return ".".join(segment for segment in segments if segment not in WRAPPER_SEGMENTS)


def is_suffix(name: str, path: str) -> bool:
    """Whether a name is a whole dotted suffix of a path."""
    return path == name or path.endswith("." + name)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is a whole dotted suffix of a path, or a regular expression of all of it.

    Raises:
        PaCAError: As :func:`matches_wholly`.
    """
    return is_suffix(pattern, path) or matches_wholly(pattern, path)


def matches_wholly(pattern: str, path: str) -> bool:
    """Whether a regular expression matches all of a path, within a limit of time: adapters bring patterns of others.

    Raises:
        PaCAError: If it takes too long, or is no regular expression.
    """
    if re.fullmatch(r"[\w-]+", pattern):  # a plain name, as most are
        return path == pattern
    import regex  # like re, with a timeout

    try:
        return regex.fullmatch(pattern, path, timeout=MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise PaCAError(
            f"The regular expression {pattern!r} takes more than {MATCH_SECONDS} s on {path!r}: it tries too many ways "
            "to match. Name the modules, or write it without nested repetitions."
        ) from error
    except (regex.error, RecursionError) as error:
        raise PaCAError(f"{pattern!r} is not a regular expression: {error}.") from error


def lies_in(path: str, outer: str) -> bool:
    """Whether a module path lies inside another one; all do inside the root's empty one."""
    return not outer or path.startswith(f"{outer}.")


def looks_local(name: str) -> bool:
    """Whether a name means a path of this machine, there or not, and no ``owner/name`` of the Hugging Face hub."""
    first, *others = name.split("/")
    return name.startswith((".", "~", "/")) or len(others) > 1 or (bool(others) and first in LOCAL_FOLDERS)


def where_it_was_sought(name: str) -> str:
    """For messages: the absolute path of a name that is not there. A relative one depends on where a run starts."""
    path = Path(name).expanduser()
    return f"looked for {path.absolute()}" + ("" if path.is_absolute() else "; start where the path begins")
