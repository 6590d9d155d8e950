"""docs/reliability.md names every test of faults, and only what exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_and_the_tests_name_each_other() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "reliability.md").read_text()))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    present = {f"tests/reliability/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert sorted(present - named - {"tests/reliability/test_page.py"}) == []
