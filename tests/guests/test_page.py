"""docs/works-with.md tells what the tests try, and nothing else."""

import re

from tests.guests.page import PAGE, ROOT, render, sections


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "write it again: python -m tests.guests.page"


def test_each_test_exists() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", render()))
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []


def test_each_guest_has_one_row() -> None:
    rows = [(section.title, row.what) for section in sections() for row in section.rows]
    assert len(rows) == len(set(rows)) > 40


def test_each_row_has_a_test_or_is_a_case_of_its_sections() -> None:
    assert [row.what for section in sections() for row in section.rows if not (row.test or section.test)] == []
