"""Amounts of memory, read and shown with units: ``24GiB``."""

import re

from paca_lightning.core.errors import PaCAError

_FACTORS = {"": 1, "B": 1, "kB": 1000} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_bytes(text: str) -> int:
    """The number of bytes in a text such as ``24GiB``, ``512 MiB``, ``80GB`` or ``1000``.

    Raises:
        PaCAError: If it is not a positive amount with a known unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in _FACTORS or float(match[1]) == 0:
        raise PaCAError(f"{text!r} is not an amount of memory. Write it as 24GiB, 512MiB or 80GB.")
    return round(float(match[1]) * _FACTORS[match[2]])


def format_bytes(count: float) -> str:
    """An amount of memory with a binary unit, such as ``1.50 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
