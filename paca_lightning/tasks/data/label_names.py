"""Labels as they stand in data, and as numbers."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.fields import is_empty, kind


def label_number(value: Any, names: Sequence[str]) -> int:
    """The class of a label: a name, or its number from 0.

    Raises:
        PaCAError: It is neither.
    """
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, str) and value in names:
        return names.index(value)
    number = _integer(value)
    if number is None:
        what = repr(value) if isinstance(value, str) else kind(value)
        raise PaCAError(f"the label is {what}, and the labels are {_listed(names)}")
    if not 0 <= number < len(names):
        raise PaCAError(f"the label is {number}, and there are {len(names)} labels, numbered from 0")
    return number


def number_label(value: Any) -> float:
    """The label of a regression.

    Raises:
        PaCAError: It is not a finite number.
    """
    try:
        number = math.nan if isinstance(value, bool) or is_empty(value) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PaCAError(f"the label is {value!r}, and a regression needs a finite number")
    return number


def several_labels(value: Any, names: Sequence[str]) -> np.ndarray:
    """Which labels a row has, as 0 and 1: float32 (labels,).

    Raises:
        PaCAError: It is not a list of labels.
    """
    if not isinstance(value, list):
        raise PaCAError(f"the label is {kind(value)}, and multi_label needs a list of labels, which may be empty")
    result = np.zeros(len(names), np.float32)
    for one in value:
        result[label_number(one, names)] = 1
    return result


def found_names(labels: Iterable[Any]) -> list[str]:
    """The names of the labels in training data: in the order of the alphabet, or numbers from 0.

    Raises:
        PaCAError: Some are numbers and others are not, or one is neither a text nor a whole number from 0.
    """
    found = {str(label).lower() if isinstance(label, bool) else label for label in labels if _is_plain(label)}
    numbers = [_integer(label) for label in found]
    if all(number is not None and number >= 0 for number in numbers):
        highest = max((number for number in numbers if number is not None), default=-1)
        if highest >= 10 * len(found) + 100:
            raise PaCAError(
                f"the labels are {len(found)} different numbers up to {highest}, which are no classes numbered from 0: "
                "set `labels` to their names, or task: regression"
            )
        return [str(number) for number in range(highest + 1)]
    if not all(isinstance(label, str) for label in found):
        wrong = next(label for label in found if not isinstance(label, str))
        raise PaCAError(
            f"the labels are texts in some rows and numbers in others, such as {wrong!r}, or numbers below 0: name "
            "them alike, or set `labels`"
        )
    return sorted(found)


def _is_plain(label: Any) -> bool:
    """Whether it can be a label at all; what is none is told with its row."""
    return isinstance(label, str | int | bool) and not is_empty(label)


def _integer(value: Any) -> int | None:
    if isinstance(value, str):
        digits = value.removeprefix("-")
        return int(value) if digits.isascii() and digits.isdigit() else None
    return value if isinstance(value, int) else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
