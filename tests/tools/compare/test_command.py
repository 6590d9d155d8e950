"""The command, with the runs of configs/debug.yaml, which are forked here: test_pool.py starts one as users do."""

import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paca_lightning.cli import main
from paca_lightning.tools.compare import pool
from paca_lightning.tools.compare.pool import TrialPool
from paca_lightning.tools.compare.trial import Trial
from tests.artefacts import PNG
from tests.distributed_launch import start_server
from tests.forked_commands import forked_commands
from tests.tools.compare.tasks import DEBUG, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CRAWLING, SANE, FLOOR = "paca:8,lr=1e-6,name=crawling", "paca:8,lr=3e-3:3e-2,name=sane", "floor"
COMMAND = ["compare", "--config", DEBUG, "--steps", "8", "--trials", "3", "--cost-steps", "2"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])
    with forked_commands(pool):
        yield


def compare(output: Path, *more: str, methods: tuple[str, ...] = (CRAWLING, SANE, FLOOR)) -> dict[str, dict[str, Any]]:
    """The rows of compare.json, by method."""
    main([*COMMAND, "--methods", *methods, "--output", str(output), *more])
    return {row["method"]: row for row in json.loads((output / "compare.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a comparison: one run of a method, and of another one that is searched first."""
    output = tmp_path_factory.mktemp("finished") / "out"
    start_server()
    with pytest.MonkeyPatch.context() as patch, forked_commands(pool):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["paca-lightning"])
        compare(output, "--seeds", "1", "--jobs", "2")
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; the names of trials' directories say nothing of where they are."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def rows(output: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((output / "compare.json").read_text())["rows"]}


def test_a_learning_rate_that_trains_nothing_loses_against_a_sane_one(finished: Path) -> None:
    found = rows(finished)
    assert found["floor"]["value_mean"] == pytest.approx(found["crawling"]["value_mean"], abs=0.01)
    assert found["sane"]["value_mean"] < found["crawling"]["value_mean"] - 1


def test_lora_that_crawls_loses_against_lora_at_a_sane_rate(tmp_path: Path) -> None:
    methods = ("lora:8,lr=1e-6,name=crawling", "lora:8,lr=2e-2,name=sane")
    found = compare(tmp_path / "out", "--seeds", "1", "--jobs", "2", "--cost-steps", "0", methods=methods)
    assert found["sane"]["trained_parameters"] == found["crawling"]["trained_parameters"]
    assert found["sane"]["value_mean"] < found["crawling"]["value_mean"] - 0.5


def test_it_shows_the_search_and_what_a_method_costs(finished: Path) -> None:
    found = rows(finished)
    sane = found["sane"]
    assert [tried["lr"] for tried in sane["search"]] == [3e-3, 9.49e-3, 3e-2]
    assert sane["lr"] == min(sane["search"], key=lambda tried: tried["value"])["lr"]
    assert found["crawling"]["search"] == []
    assert sane["trained_parameters"] == 43_008
    assert sane["adapter_bytes"] > 4 * sane["trained_parameters"]
    assert found["floor"]["time_over_floor"] == found["floor"]["memory_over_floor"] == 1
    assert sane["memory_over_floor"] > 1
    assert sane["steps"] == 8
    assert (finished / "debug.png").read_bytes().startswith(PNG)
    with (finished / "compare.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["crawling", "sane", "floor"]


def test_every_run_with_a_seed_has_the_same_rows_in_the_same_order(finished: Path) -> None:
    sums: dict[str, set[int]] = {}
    for path in finished.glob("debug/*/*/result.json"):
        kind = "search" if path.parent.name.startswith("search") else path.parent.name.partition("-lr")[0]
        sums.setdefault(kind, set()).add(json.loads(path.read_text())["rows_checksum"])
    assert {kind: len(different) for kind, different in sums.items()} == {"search": 1, "seed-1": 1}
    assert sums["search"] != sums["seed-1"]


def test_a_trial_is_a_config_that_fit_takes(finished: Path) -> None:
    config = next(finished.glob("debug/crawling/*/config.yaml"))
    before = json.loads((config.parent / "result.json").read_text())
    main(["fit", "--config", str(config)])
    after = json.loads((config.parent / "result.json").read_text())
    assert after["final"] == before["final"]


def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the trials that start from now on."""
    labels: list[str] = []
    start = TrialPool.start

    def note(self: TrialPool, trial: Trial) -> None:
        labels.append(trial.label)
        start(self, trial)

    monkeypatch.setattr(TrialPool, "start", note)
    return labels


def test_a_stopped_comparison_goes_on_with_what_is_missing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, before = started(monkeypatch), rows(output)
    again = compare(output, "--seeds", "1")
    figures = ("lr", "search", "value_mean", "step_ms", "saved_bytes")
    assert {name: [row[f] for f in figures] for name, row in again.items()} == {
        name: [row[f] for f in figures] for name, row in before.items()
    }
    assert labels == []
    next(output.glob("debug/sane/seed-1*/result.json")).unlink()
    again = compare(output, "--seeds", "1")
    assert labels == [f"sane, lr {again['sane']['lr']:g}, seed 1"]
    assert again["sane"]["value_mean"] == before["sane"]["value_mean"]


def test_time_that_is_up_starts_nothing_and_says_so(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = started(monkeypatch)
    found = compare(output, "--seeds", "2", "--minutes", "0.0000001")
    assert labels == []
    assert found["sane"]["runs"] == 1
    assert "The same command goes on from here" in capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must fail says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*COMMAND, *arguments])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "lorra:8"], "There is no method 'lorra'"),
        (["--methods", "paca:8", "--lr", "1e-2:1e-3"], "--lr='1e-2:1e-3' is reversed"),
        (["--methods", "paca:8", "--trials", "2"], "--trials must be at least 3"),
        (["--methods", "paca:8", "--seeds", "0"], "--seeds must be positive"),
        (["--methods", "paca:8,selectoin=random"], "Unknown PaCA settings ['selectoin']"),
        (["--methods", "paca:8", "--model.init_args.nothing", "3"], "nothing"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in failure(capsys, *arguments, "--output", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/debug/*"))


def test_an_output_of_something_else_is_not_written_to(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "--methods", CRAWLING, "--output", str(finished), "--steps", "9")
    assert "holds another comparison: it differs in steps." in message
    message = failure(capsys, "--methods", CRAWLING, "--output", str(finished), "--trainer.gradient_clip_val", "1")
    assert "holds another comparison: it differs in the config debug." in message
    message = failure(capsys, "--methods", CRAWLING, "--output", str(finished / "debug"))
    assert "holds other files, and no comparison" in message


def test_a_run_that_cannot_be_compared_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--methods", CRAWLING, "--output", str(tmp_path / "out"), "--metric", "val/los"]
    message = failure(capsys, *arguments)
    assert "The run of crawling, lr 1e-06, seed 1 failed (exit code 2)" in message
    assert "Validation logs no metric 'val/los', but ['val/loss', 'val/perplexity']" in message
    assert "log.txt" in message


def test_the_help_teaches_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    printed = capsys.readouterr().out
    assert "NAME[:SIZE][,OPTION=VALUE]" in printed
    assert "--widen" in printed
