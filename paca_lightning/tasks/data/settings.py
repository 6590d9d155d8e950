"""Checks of the settings that all data modules of rows have."""

from collections.abc import Mapping
from typing import Any

from paca_lightning.core.errors import PaCAError

AT_LEAST = {"max_length": 2, "batch_size": 1, "pad_to_multiple_of": 1, "num_workers": 0, "seed": 0}


def check_numbers(settings: Mapping[str, Any], others: Mapping[str, int] | None = None) -> None:
    """Check numbers that have a least value.

    Args:
        settings: Of a data module.
        others: Least values of further ones, which may be None.

    Raises:
        PaCAError: One is below its least value.
    """
    for name, least in (AT_LEAST | dict(others or {})).items():
        if settings[name] is not None and settings[name] < least:
            raise PaCAError(f"{name} is {settings[name]}, but must be at least {least}.")


def check_held_out(settings: Mapping[str, Any]) -> None:
    """Check the share of training rows that is held out.

    Raises:
        PaCAError: It is out of range, or there are validation rows already.
    """
    fraction = settings["validation_fraction"]
    if not 0 <= fraction < 1:
        raise PaCAError(f"validation_fraction is {fraction}, but must be at least 0 and below 1.")
    if settings["validation"] is not None and fraction:
        raise PaCAError("validation_fraction holds out training rows; with `validation` set it must be 0.")
