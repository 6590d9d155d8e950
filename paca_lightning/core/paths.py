"""Paths of modules: without the segments that wrappers add, and how patterns match them."""

import re

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import WRAPPER_SEGMENTS

MATCH_SECONDS = 0.5
"""Of CPU time for one pattern on one path, which takes microseconds unless the pattern backtracks without end."""


def clean_path(path: str) -> str:
    """A module's path without the segments that wrappers add."""
    return ".".join(segment for segment in path.split(".") if segment not in WRAPPER_SEGMENTS)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is a whole dotted suffix of a path, or a regular expression of all of it.

    Raises:
        PaCAError: As :func:`matches_wholly`.
    """
    return path == pattern or path.endswith("." + pattern) or matches_wholly(pattern, path)


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
