"""Paths of modules: without the segments that wrappers add, and how patterns match them."""

import re

from paca_lightning.core.private.torch import WRAPPER_SEGMENTS


def clean_path(path: str) -> str:
    """A module's path without the segments that wrappers add."""
    return ".".join(segment for segment in path.split(".") if segment not in WRAPPER_SEGMENTS)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is a whole dotted suffix of a path, or a regular expression of all of it."""
    return path == pattern or path.endswith("." + pattern) or re.fullmatch(pattern, path) is not None
