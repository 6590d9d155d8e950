"""A run of a comparison is a command of its own, in a fresh process."""

from pathlib import Path

import pytest

from paca_lightning.cli import main
from tests.tools.compare.tasks import DEBUG, ROOT


@pytest.mark.slow
def test_a_run_that_fails_is_told_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["paca-lightning"])
    arguments = ["--methods", "paca:8,lr=1e-6", "--steps", "8", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config", DEBUG, *arguments, "--data.init_args.validation", "null"])
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "The run of paca:8, lr 1e-06, seed 1 failed (exit code 2)" in message
    assert "A comparison needs validation, and this run has none" in message
    assert "log.txt" in message
