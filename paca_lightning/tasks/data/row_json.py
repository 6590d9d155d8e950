"""Rows as JSON text and back. Values that JSON has no type for, such as dates and images, stay recognizable."""

import json
from typing import Any

from paca_lightning.core.errors import PaCAError

_MARK = "paca_lightning/type"


def to_json(content: Any) -> str:
    """A row as text.

    Raises:
        PaCAError: It has too many levels.
    """
    try:
        return json.dumps(content, default=lambda value: {_MARK: type(value).__name__})
    except RecursionError as error:
        raise PaCAError("is nested too deeply to be read") from error


def from_json(text: str) -> Any:
    """The row that `to_json` wrote. A value without a type in JSON is an empty object of a class of the same name."""
    return json.loads(text, object_hook=_restored if _MARK in text else None)


def _restored(found: dict[str, Any]) -> Any:
    return type(found[_MARK], (), {})() if found.keys() == {_MARK} else found
