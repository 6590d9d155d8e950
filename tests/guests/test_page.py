"""docs/works-with.md tells what the tests try, and nothing else."""

from tests.guests.page import PAGE, ROOT, render, sections


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "write it again: python -m tests.guests.page"


def test_each_test_exists() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {row.test for _, rows in sections() for row in rows}
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []


def test_each_guest_has_one_row() -> None:
    rows = [(title, row.what) for title, found in sections() for row in found]
    assert len(rows) == len(set(rows)) > 40
