"""The command bench on a tiny model: its schema and its refusals."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from paca_lightning import PaCAError
from paca_lightning.tools.bench.command import bench
from paca_lightning.tools.bench.workload import Workload
from tests.tiny import tiny_llama


@pytest.mark.distributed
def test_bench_writes_rows_in_the_fixed_schema(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "results"
    rows = bench(
        model=model, methods="paca,lora", r=8, batch=2, tokens=16, dtype="fp32", steps=3, threads=1, output=str(output)
    )
    written = json.loads((output / "bench.json").read_text())

    assert [(row["method"], row["r"]) for row in rows] == [("floor", None), ("paca", 8), ("lora", 8), ("lora", 4)]
    assert json.loads(json.dumps(rows)) == written["rows"]
    fixed = {
        "method",
        "r",
        "step_ms",
        "ratio_to_floor",
        "saved_bytes",
        "peak_bytes",
        "trainable_parameters",
        "tokens_per_second",
    }
    weights = sum(parameter.nbytes for parameter in tiny_llama().parameters())
    for row in written["rows"]:
        assert fixed <= set(row)
        assert 0 < max(row[f"{part}_ms"] for part in ("forward", "backward", "optimizer")) <= row["step_ms"]
        assert row["peak_bytes"] > weights
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio_to_floor"] <= high
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["step_ms"] * 1e3)
    assert written["setup"]["workload"]["tokens"] == 16
    assert written["setup"]["versions"]["torch"]
    with (output / "bench.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["floor", "paca", "lora", "lora"]
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "paca r=8" in capsys.readouterr().out


@pytest.mark.distributed
def test_quantized_methods_are_compared_with_the_quantized_floor(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bench(model=model, methods="qpaca:4,qlora:4", batch=1, tokens=8, dtype="fp32", steps=3, threads=1)
    assert [(row["method"], row["floor"]) for row in rows] == [
        ("floor", "floor"),
        ("qfloor", "floor"),
        ("qpaca", "qfloor"),
        ("qlora", "qfloor"),
    ]
    floor, quantized, paca, _ = rows
    assert floor["ratio_to_floor"] == 1 != quantized["ratio_to_floor"]
    assert paca["ratio_to_floor"] != paca["step_ms"] / floor["step_ms"]
    assert "(qfloor)" in capsys.readouterr().out


@pytest.mark.distributed
def test_bench_finds_the_longest_sequence(model: str) -> None:
    rows = bench(
        model=model,
        methods=["paca:4"],
        batch=1,
        tokens=8,
        dtype="fp32",
        steps=1,
        threads=1,
        max_length="12MiB",
    )
    assert all(row["max_tokens"] >= 64 and row["max_tokens"] % 64 == 0 for row in rows)


@pytest.mark.distributed
def test_several_ranks_train_together(model: str) -> None:
    rows = bench(model=model, methods="paca:4,lora:2", batch=1, tokens=8, dtype="fp32", steps=2, threads=1, devices=2)
    assert [row["method"] for row in rows] == ["floor", "paca", "lora"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(2 * 8 / row["step_ms"] * 1e3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "paca,lorra"}, "no method 'lorra'.*floor, paca, lora.*qlora"),
        ({"methods": "paca:none"}, "'none' is not a rank"),
        ({"methods": "full:8"}, "'full' has no rank"),
        ({"methods": "qfloor:8"}, "'qfloor' has no rank"),
        ({"r": "8,x"}, "not a rank or a list of ranks"),
        ({"r": 0}, "ranks must be positive"),
        ({"r": 65}, "65"),
        ({"match": "size"}, "match='size' is unknown"),
        ({"preset": "llama9", "model": None}, "no preset 'llama9'.*small, small-moe, llama3-8b"),
        ({"preset": "small"}, "either a model .* or a preset"),
        ({"model": None}, "either a model .* or a preset"),
        ({"model": "/nowhere/at/all"}, "'/nowhere/at/all' does not exist"),
        ({"preset": "small-moe", "model": None, "methods": "dora:2"}, "DoRA cannot adapt stacked experts"),
        ({"layers": 3}, "layers=3 is more than the model's 2"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"devices": 0}, "ranks must be at least 1"),
        ({"device": "tpu"}, "device='tpu' is not available"),
        ({"max_length": "100kB"}, "below the model itself: its weights take"),
        ({"attention": "flash"}, "cannot use attention='flash'"),
        ({"liger": True}, "liger=True needs"),
        ({"max_length": "lots"}, "'lots' is not an amount of memory"),
        ({"max_length": "1GiB", "compile": True, "device": "cpu"}, "without --compile"),
        ({"output": "/proc/nothing"}, "--output: '/proc/nothing' cannot be written"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    model: str, arguments: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr("paca_lightning.tools.bench.command.peak_bytes", measured)
    with pytest.raises(PaCAError, match=message):
        bench(**({"model": model} | arguments))  # type: ignore[arg-type]


def test_a_config_without_weights_is_told(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(PaCAError, match=r"weights of '.*' cannot be read: .*model\.safetensors"):
        Workload(model=str(tmp_path), dtype="fp32", tokens=8).build()


def test_methods_that_leave_experts_frozen_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stop here before anything is measured."""
    monkeypatch.setattr("paca_lightning.tools.bench.command.open_output", lambda _: pytest.fail("went on"))
    told = pytest.warns(UserWarning, match=r"experts frozen in bf16 \('model\.layers\.0\..* of 8 weights\)")
    with told, pytest.raises(PaCAError, match="below the model itself"):
        bench(preset="small-moe", methods="qpaca:4", max_length="1MiB", threads=1, device="cpu")


def test_missing_peft_names_the_extra(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PaCAError, match=r"paca-lightning\[bench\]"):
        bench(model=model, methods="lora", steps=1)


def test_without_a_device_the_cpu_is_measured_also_by_a_pytorch_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch for CUDA names an accelerator even where there is none, unless it is asked to look."""

    def found(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr("torch.accelerator.current_accelerator", found)
    with pytest.raises(PaCAError, match="steps must be at least 1"):
        bench(preset="small", steps=0)
