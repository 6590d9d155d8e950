"""The paper's comparison: its table, what stops a part, and a run on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paca_lightning.tools.bench import paper
from paca_lightning.tools.bench.command import bench
from paca_lightning.tools.bench.paper import (
    PARTS,
    NotEnoughMemoryError,
    Outcome,
    compare_with_paper,
    measure_parts,
    print_comparison,
)

CPU, GPU = ({"device": device, "tokens": 512} for device in ("cpu", "cuda"))


def rows(methods: str, batch: int) -> list[dict[str, Any]]:
    """Rows of a machine on which PaCA takes 0.8 x LoRA's time, and batches of 4 are fastest."""
    names = [tuple(method.split(":")) for method in ("floor:0," + methods).split(",")]
    speed = {"lora": 100.0, "qlora": 80.0, "dora": 50.0, "floor": 130.0}
    return [
        {
            "method": name,
            "r": int(r) or None,
            "floor": "floor",
            "step_ms": 1e3 / speed.get(name, 125.0),
            "ratio_to_floor": 1.0,
            "ratio_quartiles": (1.0, 1.0),
            "noisy": False,
            "forward_ms": 1.0,
            "backward_ms": 1.0,
            "optimizer_ms": 1.0,
            "tokens_per_second": speed.get(name, 125.0) * (2.0 if batch == 4 else 1.0),
            "saved_bytes": 10,
            "peak_bytes": 300 if name == "lora" else 240,
            "trainable_parameters": 1,
            "max_tokens": 4096 if name == "lora" else 8192,
        }
        for name, r in names
    ]


def measured(**options: Any) -> list[dict[str, Any]]:
    if options["batch"] > 4:
        raise NotEnoughMemoryError("paca r=8 needs more memory than this machine has.")
    return rows(options["methods"], options["batch"])


def test_our_figures_stand_beside_the_published_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcomes = measure_parts(measured, GPU, "80GB", tmp_path)
    print_comparison(outcomes)
    figures = {
        claim.text: claim.ours(outcome.rows)
        for outcome, part in zip(outcomes, PARTS, strict=True)
        for claim in part.claims
    }
    assert figures == {
        "time of a step, PaCA against LoRA": pytest.approx(-0.2),
        "time of a step, PaCA against DoRA": pytest.approx(-0.6),
        "peak memory, PaCA against LoRA": pytest.approx(-0.2),
        "time, QPaCA against QLoRA": pytest.approx(-0.36),
        "tokens a second, PaCA against LoRA": pytest.approx(0.25),
        "longest sequence, PaCA against LoRA": pytest.approx(1.0),
    }
    printed = capsys.readouterr().out
    assert "-22%" in printed
    assert "-20%" in printed
    assert "batch 8: paca r=8 needs more memory" in printed
    assert [each["part"] for each in json.loads((tmp_path / "paper.json").read_text())] == [part.name for part in PARTS]
    throughput = outcomes[2]
    assert {row["tokens_per_second"] for row in throughput.rows if row["method"] == "paca"} == {250.0}


def test_a_part_that_does_not_fit_says_why_and_the_others_go_on() -> None:
    def too_small(**options: Any) -> list[dict[str, Any]]:
        if "dora" in options["methods"]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")
        return measured(**options)

    step, quantized, throughput, longest = measure_parts(too_small, CPU, None, None)
    assert (step.rows, step.stopped) == ([], "batch 4: CUDA out of memory.")
    assert quantized.rows
    assert throughput.rows
    assert "--max-length" in longest.stopped


@pytest.mark.parametrize(("layers", "model", "used"), [(None, None, 1), (3, None, 3), (None, "tiny", None)])
def test_a_cpu_takes_one_layer_unless_told_otherwise(layers: int | None, model: str | None, used: int | None) -> None:
    seen = set()

    def recorded(**options: Any) -> list[dict[str, Any]]:
        seen.add((options["layers"], options.get("preset"), options.get("model")))
        return measured(**options)

    compare_with_paper(recorded, CPU, model, layers, None, None)
    assert seen == {(used, None if model else "llama3-8b", model)}


@pytest.mark.distributed
@pytest.mark.slow
def test_the_command_measures_a_tiny_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "PARTS", (PARTS[0],))
    measured = bench(
        model=model, preset="paper", tokens=8, steps=1, dtype="fp32", device="cpu", threads=1, output=str(tmp_path)
    )
    assert [row["method"] for row in measured] == ["floor", "paca", "paca", "lora", "dora"]
    assert (tmp_path / "step" / "bench.json").exists()
    (outcome,) = json.loads((tmp_path / "paper.json").read_text())
    assert Outcome(**outcome).rows == json.loads(json.dumps(measured))
    assert "The paper's claims" in capsys.readouterr().out
