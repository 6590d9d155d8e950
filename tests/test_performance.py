"""docs/performance.md shows just what docs/performance/*.json holds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts import performance
from scripts.performance import DOCUMENT, SETTINGS, Setting, load, measure, render
from scripts.performance_tables import bars, bench_table, estimate_table, lines, promises_table, stacks


def bench_row(method: str, r: int | None = None, **figures: Any) -> dict[str, Any]:
    row = {"method": method, "r": r, "floor": "floor", "noisy": False, "trainable_parameters": 1000}
    row |= {"step_ms": 100.0, "forward_ms": 40.0, "backward_ms": 59.0, "optimizer_ms": 1.0, "tokens_per_second": 2048.0}
    row |= {"ratio_to_floor": 1.0, "ratio_quartiles": [0.99, 1.01], "saved_bytes": 2**20, "peak_bytes": 3 * 2**20}
    return row | figures


def bench_run(label: str = "", tokens: int = 512) -> dict[str, Any]:
    setup = {"title": "small", "workload": {"tokens": tokens, "threads": 2, "dtype": "bf16"}, "steps": 3}
    rows = [
        bench_row("floor"),
        bench_row(
            "paca", 16, ratio_to_floor=1.02, ratio_quartiles=[1.01, 1.03], step_ms=102.0, tokens_per_second=2000.0
        ),
        bench_row("lora", 8, ratio_to_floor=1.36, ratio_quartiles=[1.2, 1.4], peak_bytes=4 * 2**20, noisy=True),
        bench_row("lora-narrow", 8, peak_bytes=None),
    ]
    return {"label": label, "command": "paca-lightning bench", "rows": rows, "setup": setup}


def estimate_run() -> dict[str, Any]:
    def row(method: str, activations: int, longest: int) -> dict[str, Any]:
        kinds = {"parameters": 1, "gathered_parameters": 0, "gradients": 1, "optimizer": 2, "temporary": 0}
        sizes = {f"{kind}_bytes": size * 2**30 for kind, size in (kinds | {"activations": activations}).items()}
        return {"method": method, **sizes, "peak_bytes": (activations + 4) * 2**30, "max_tokens": longest}

    rows = [row("PaCA", 4, 2000), row("LoRA", 12, 1000), row("LoRA, adapters as narrow as the model", 6, 1600)]
    return {"label": "", "command": "paca-lightning estimate", "rows": rows, "setup": {}}


def test_the_document_is_what_the_figures_give() -> None:
    document = DOCUMENT.read_text()
    assert render(document, load()) == document


def test_the_figures_are_of_the_settings() -> None:
    def without_steps(command: str) -> str:
        return re.sub(r" --steps \d+", "", command)

    for name, runs in load().items():
        expected = {label: f"paca-lightning {without_steps(text)}" for label, text in SETTINGS[name].commands.items()}
        assert {run["label"]: without_steps(run["command"]) for run in runs} == expected, f"measure {name} again"


def test_a_document_without_a_settings_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="has 0 parts <!-- begin small-512 -->"):
        render(DOCUMENT.read_text().replace("<!-- begin small-512 -->", ""), {})


def test_a_table_tells_noise_and_what_was_not_measured() -> None:
    table = bench_table([bench_run()]).splitlines()
    assert table[3].startswith("| **PaCA r=16** | 102.0 | **1.020** | 1.010-1.030 |")
    assert "| 1.360 (noisy) |" in table[4]
    assert "| 1.0 | - | 1,000 | 2,048 |" in table[5]


def test_runs_of_one_table_have_their_labels() -> None:
    table = bench_table([bench_run("128 tokens"), bench_run("256 tokens")]).splitlines()
    assert table[0].startswith("|  | method | step ms |")
    assert table[7].startswith("| 256 tokens | **PaCA r=16** |")


def test_memory_is_compared_with_lora() -> None:
    table = estimate_table([estimate_run()]).splitlines()
    assert table[2] == "| **PaCA** | 1.00 | 0 | 4.00 | 1.00 | 2.00 | 0 | **8.00** | **0.50** | 2,000 |"


def test_promises_are_computed_from_the_figures() -> None:
    settings = {"small-512": [bench_run()], "estimate-8b": [estimate_run()]}
    table = promises_table(settings)
    # The peak of one method was not measured.
    assert "| peak memory | 16% less | 4 layers of hidden 1024, 2 x 512 tokens, CPU | 25% less |  |" in table
    # Of the ratios to the floor, not of the medians of step_ms.
    assert "| time of a step | 22% less | 4 layers of hidden 1024, 2 x 512 tokens, CPU | 25% less | 2% more |" in table
    assert "| tokens a second | 16% more | 4 layers of hidden 1024, 2 x 512 tokens, CPU | 33% more | 2% less |" in table
    assert "| peak memory | 16% less | Llama-3-8B, 2,048 tokens, traced | 50% less | 20% less |" in table
    assert "| longest sequence | 23% more | Llama-3-8B in 80 GB, traced | 100% more | 25% more |" in table
    assert "SmolLM2" not in table


@pytest.mark.parametrize(
    ("plot", "runs"),
    [(bars, [bench_run()]), (lines, [bench_run(tokens=n) for n in (128, 256)]), (stacks, [estimate_run()])],
)
def test_plots_are_small_files(plot: Any, runs: list[dict[str, Any]], tmp_path: Path) -> None:
    plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size < 60_000


class Finished:
    def __init__(self, returncode: int) -> None:
        self.returncode = returncode


def test_commands_are_run_as_a_user_would(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(words: list[str], *, env: dict[str, str], **_: Any) -> Finished:
        ran.append(words)
        assert "OMP_NUM_THREADS" not in env
        is_bench = "--output" in words
        file = Path(words[-1], "bench.json") if is_bench else Path(words[-1])
        file.write_text(json.dumps({"rows": [], "setup": {"command": "/my/home/paca-lightning", "steps": 2}}))
        return Finished(0 if is_bench else 1)  # an estimate that does not fit its budget

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(performance.subprocess, "run", run)
    first, second = measure(Setting({"a": "bench --preset small --steps 9 --batch 2", "b": "estimate --tokens 8"}), 2)
    assert first == {
        "label": "a",
        "command": "paca-lightning bench --preset small --steps 2 --batch 2",
        "rows": [],
        "setup": {"steps": 2},
    }
    assert second["command"] == "paca-lightning estimate --tokens 8"
    assert ran[0][1:9] == ["-m", "paca_lightning.cli", "bench", "--preset", "small", "--steps", "2", "--batch"]


def test_a_command_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance.subprocess, "run", lambda *_, **__: Finished(1))
    with pytest.raises(SystemExit, match="exit code 1"):
        measure(Setting({"": "bench --preset small"}))
