"""Reads the fields of a row one by one, so that what nobody read can be reported."""

import json
from typing import Any

from paca_lightning.core.errors import PaCAError

Row = dict[str, Any]


_SIZED = (str, list, dict)


def is_empty(value: object) -> bool:
    """Whether a field holds nothing: null, NaN (as pandas writes null), or an empty text, list or object."""
    return value is None or (not value if isinstance(value, _SIZED) else _is_nan(value))


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and value != value


def kind(value: object) -> str:
    """The type of a value in words, for messages."""
    name = type(value).__name__
    return "null" if value is None else f"an {name}" if name[0] in "aeio" else f"a {name}"


class Fields:
    """A row, or an object inside it. Each field is taken once; `unread` names those that are left.

    Args:
        values: The fields.
        where: Prefix of their names in messages, such as `messages[0].`.
    """

    def __init__(self, values: Row, where: str = "") -> None:
        self.values = values
        self.where = where
        self._left = dict(values)

    def __contains__(self, name: str) -> bool:
        return not is_empty(self.values.get(name))

    def take(self, *names: str) -> Any:
        """The value of the first of these fields that holds something, else None. All of them count as read."""
        found = None
        for name in names:
            value = self._left.pop(name, None)
            if found is None and not is_empty(value):
                found = value
        return found

    def text(self, name: str) -> str:
        """A field that must hold a text.

        Raises:
            PaCAError: The field is missing, is not a string, or cannot be encoded as UTF-8.
        """
        if name not in self.values:
            has = ", ".join(map(repr, self.values)) or "no fields"
            raise PaCAError(f"the field '{self.where}{name}' is missing; the row has {has}")
        value = self._left.pop(name, None)
        if _is_nan(value):
            value = None
        return checked_text(value, f"{self.where}{name}")

    def optional_text(self, *names: str) -> str | None:
        """The text of the first of these fields that holds something, else None."""
        if self.values.keys().isdisjoint(names):
            return None
        name = next((name for name in names if name in self), names[0])
        value = self.take(*names)
        return None if value is None else checked_text(value, f"{self.where}{name}")

    def parsed(self, name: str) -> Any:
        """A field that holds a list or object, or the JSON of one; None if it is empty."""
        value = self.take(name)
        return parsed_json(value, f"{self.where}{name}") if isinstance(value, str) else value

    def unread(self) -> list[str]:
        """Names of the fields that hold something and were not taken."""
        return [name for name, value in self._left.items() if not is_empty(value)]


def checked_text(value: object, name: str) -> str:
    """A value that must be a text.

    Raises:
        PaCAError: It is not a string, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise PaCAError(f"the field '{name}' is {kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PaCAError(f"the field '{name}' holds half of a surrogate pair, which is no valid text") from error
    return value


def checked_json(value: Any, name: str) -> Any:
    """A value that must be one of JSON: Parquet also has dates, decimals and bytes.

    Raises:
        PaCAError: It holds something else, a text that cannot be encoded as UTF-8, or too many levels.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise PaCAError(f"the field '{name}' holds half of a surrogate pair, which is no valid text") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise PaCAError(f"the field '{name}' holds what is not JSON ({error})") from error
    return value


def parsed_json(text: str, name: str) -> Any:
    """The value of a text that must be JSON.

    Raises:
        PaCAError: It is not valid JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PaCAError(f"the field '{name}' is a text that is not valid JSON ({error})") from error
