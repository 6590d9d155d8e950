"""Runs that are killed while they write, and resumed. ``make soak`` kills 50 times in each case, anywhere."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.processes import run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler and Linux")
def test_killed_runs_go_on_from_the_last_complete_state_to_the_same_end() -> None:
    """One launch for all cases: half of a write is done, a rename or removal not at all, when the process dies."""
    command = [sys.executable, "-m", "tests.reliability.killed_runs", "--kills=1", "--cases=single,fsdp2"]
    done = run(command, directory=ROOT)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["failures"] for report in reports] == [[], []], done.stderr
    assert [report["kills"] for report in reports] == [1, 1]
    assert all(report["operations"] > 100 for report in reports)
