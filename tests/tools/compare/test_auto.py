"""``fit --lr auto``: the search before a run."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paca_lightning.cli import main
from paca_lightning.tools.compare import pool
from paca_lightning.tools.compare.auto import asks_for_search
from tests.forked_commands import forked_commands
from tests.tools.compare.tasks import DEBUG, ROOT


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])


def fit(directory: Path) -> list[str]:
    outputs = [f"--trainer.default_root_dir={directory}", f"--trainer.logger.init_args.save_dir={directory}"]
    return ["fit", "--config", DEBUG, *outputs, "--trainer.max_steps=2", "--trainer.max_epochs=-1"]


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [(["--lr", "auto"], True), (["--lr=auto"], True), (["--config", "lr.yaml"], False), (["--lrx", "1"], False)],
)
def test_who_asks_for_a_search(arguments: list[str], asked: bool) -> None:
    assert asks_for_search(arguments) == asked


@pytest.mark.slow
@pytest.mark.distributed
def test_it_trains_with_the_best_of_the_rates_tried_and_says_how_to_repeat_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with forked_commands(pool):
        main([*fit(tmp_path), "--lr", "1e-6:1e-2", "--lr-trials", "3", "--lr-jobs", "3"])
    said = " ".join(capsys.readouterr().err.split())
    assert "Searching the learning rate: 1e-06 to 0.01, 3 runs of 2 steps." in said
    assert "Learning rate 0.01: val/loss" in said
    assert "lies at the upper edge of those tried (1e-06 to 0.01)" in said
    assert "--trainer.max_epochs=-1 --model.init_args.optimizer.init_args.lr=0.01" in said
    config: dict[str, Any] = yaml.safe_load((tmp_path / "version_0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert (tmp_path / "version_0" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--lr", "1e-2:1e-4"], "--lr='1e-2:1e-4' is reversed"),
        (["--lr", "1e-3"], "is one learning rate: there is nothing to search"),
        (["--lr", "auto", "--lr-trials", "1"], "--lr-trials must be at least 3"),
        (["--lr", "auto", "--ckpt_path", "last"], "one that is resumed (--ckpt_path) has its learning rate"),
        (["--lr", "auto", "--lr-key", "model.lr"], "no setting 'lr' where the learning rate should be"),
    ],
)
def test_mistakes(arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*fit(tmp_path), *arguments])
    assert stop.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
