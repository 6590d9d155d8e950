"""Amounts of memory, read and shown."""

import pytest

from paca_lightning.tools.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 1572864), ("1000", 1000), ("5B", 5)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_amounts_of_memory_are_shown_in_binary_units() -> None:
    assert [format_bytes(count) for count in (512, 1536, 3 * 2**20, 5 * 2**29)] == [
        "512 B",
        "1.5 KiB",
        "3.0 MiB",
        "2.50 GiB",
    ]
