"""`make gpu` without a GPU: its stages, what it keeps, and what it says is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from paca_lightning.tools.presets import preset_config
from scripts import gpu_arithmetic
from scripts.gpu import PYTHON, STAGES, Stage, missing_for_gpu, run_stages

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "performance" / "small-512.json"
"""Figures that a benchmark wrote."""


def python(code: str) -> tuple[str, ...]:
    return (PYTHON, "-c", code)


def counting(file: Path, then: str = "") -> tuple[str, ...]:
    """A command that notes each of its runs."""
    return python(f"open({str(file)!r}, 'a').write('x'); {then}")


def bench_json(directory: Path) -> Path:
    """What a benchmark wrote, made from figures that the repository keeps."""
    (kept,) = json.loads(KEPT.read_text())
    file = directory / "kept.json"
    file.write_text(json.dumps(kept))
    return file


def test_results_are_kept_and_only_what_was_cut_off_runs_again(tmp_path: Path) -> None:
    runs = tmp_path / "fast", tmp_path / "slow"
    bench = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    stages = (
        Stage("fast", (*counting(runs[0], bench), str(bench_json(tmp_path)), "{folder}/bench.json"), 60),
        Stage("slow", counting(runs[1], "import time; print('begun', flush=True); time.sleep(60)"), 2),
        Stage("broken", python("raise SystemExit(3)"), 60),
    )
    output = tmp_path / "out"
    output.mkdir()
    results = run_stages(stages, output, "a")
    assert [result.code for result in results] == [0, None, 3]
    assert results[1].last_lines == ["begun"]

    run_stages(stages, output, "a")
    assert [file.read_text() for file in runs] == ["x", "xx"]
    run_stages(stages[:1], output, "b")  # another commit
    assert runs[0].read_text() == "xx"

    report = (output / "results.md").read_text()
    assert "| fast | passed after" in report
    assert "## fast" in report
    assert "PaCA r=16" in report
    assert json.loads((output / "results.json").read_text())["figures"]["fast"][0]["rows"]


def test_all_stages_fit_into_eight_minutes() -> None:
    assert sum(stage.limit for stage in STAGES) <= 480  # the rest is for the installation


def test_the_document_shows_the_computed_arithmetic() -> None:
    document = (ROOT / "docs" / "gpu.md").read_text()
    shown = document.split("<!-- begin arithmetic -->")[1].split("<!-- end arithmetic -->")[0]
    assert shown.strip() == gpu_arithmetic.table()


def test_the_counted_weights_are_the_models() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(preset_config("llama3-8b"))
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(gpu_arithmetic.linear_shapes()) == sorted(tuple(layer.weight.shape) for layer in layers)
    products, _ = gpu_arithmetic.frozen_step(tokens=1)
    assert products.flops == 4 * sum(layer.weight.numel() for layer in [*layers, model.lm_head])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.distributed
def test_without_a_gpu_one_line_says_what_is_missing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "scripts.gpu", "--output", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("make gpu: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("driver", "cuda", "message"),
    [(None, "12.8", "no NVIDIA driver"), ("/bin/x", None, "without CUDA"), ("/bin/x", "12.8", "no CUDA device")],
)
def test_what_is_missing(driver: str | None, cuda: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in str(missing_for_gpu())
