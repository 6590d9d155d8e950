"""docs/works-with.md tells what the tests try, and nothing else."""

from tests.guests.page import PAGE, render, sections


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "write it again: python -m tests.guests.page"


def test_each_guest_has_one_row() -> None:
    rows = [(title, row.what) for title, found in sections() for row in found]
    assert len(rows) == len(set(rows)) > 40
