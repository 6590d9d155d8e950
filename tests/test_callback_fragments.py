"""The fragments in callbacks/, in LightningCLI projects that know nothing of paca_lightning (tests/projects)."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from paca_lightning.cli import main
from tests.mmlu_files import write_csv_folders

ROOT = Path(__file__).parents[1]
CALLBACKS = ROOT / "callbacks"


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of("vision_transformer", tmp_path_factory.mktemp("vision"))


def copy_of(project: str, directory: Path) -> Path:
    return Path(shutil.copytree(ROOT / "tests" / "projects" / project, directory, dirs_exist_ok=True))


def python_train(project: Path, command: str, *fragments: str, more: tuple[str, ...] = ()) -> str:
    """Runs the project's train.py as its user would; its output."""
    base = ["--config", "config.yaml"] if (project / "config.yaml").exists() else []
    added = [argument for name in fragments for argument in ("--config", str(CALLBACKS / f"{name}.yaml"))]
    finished = subprocess.run(
        [sys.executable, "train.py", command, *base, *added, *more],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def callbacks_of(config: Path) -> list[str]:
    """Names of the callbacks in the config that LightningCLI saved with a run."""
    saved = yaml.safe_load(config.read_text(encoding="utf-8"))
    return [entry["class_path"].rpartition(".")[2] for entry in saved["trainer"]["callbacks"]]


def trained_keys(checkpoint: Path) -> set[str]:
    return set(torch.load(checkpoint, weights_only=True)["state_dict"])


@pytest.fixture(scope="module")
def trained(vision: Path) -> Path:
    """The vision transformer after a run with fragments: the run's directory."""
    python_train(vision, "fit", "paca", "adapter", "heldout")
    return vision / "logs" / "version_0"


def test_the_users_own_callbacks_are_still_there(vision: Path, trained: Path) -> None:
    added = ["PaCAStrategy", "AdapterCheckpoint", "HeldOutLoss", "LossPlot"]
    assert callbacks_of(trained / "config.yaml") == ["ModelCheckpoint", "LossNotes", *added]
    assert len((vision / "notes.txt").read_text().splitlines()) == 4  # one an epoch
    assert (vision / "checkpoints" / "last.ckpt").is_file()


def test_checkpoint_holds_the_adapter_alone(vision: Path, trained: Path) -> None:
    layers = {f"net.blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "proj", "mlp.0", "mlp.2")}
    expected = {f"{layer}.{part}" for layer in layers for part in ("paca_delta", "paca_indices")}
    assert trained_keys(vision / "checkpoints" / "last.ckpt") == expected


def test_run_leaves_an_adapter_and_a_plot_and_learns(trained: Path) -> None:
    assert json.loads((trained / "adapter" / "adapter_config.json").read_text())["r"] == 16
    assert (trained / "loss.png").stat().st_size > 0
    losses = values_of(trained / "metrics.csv", "val/loss")
    assert losses[-1] < 0.9 * losses[0]


def values_of(metrics: Path, name: str) -> list[float]:
    with metrics.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_an_adapter_is_evaluated_in_the_project(vision: Path, trained: Path) -> None:
    before = (vision / "notes.txt").read_text().splitlines()
    more = (f"--trainer.callbacks.adapter={trained / 'adapter'}",)
    python_train(vision, "validate", "from_adapter", more=more)
    assert (vision / "notes.txt").read_text().splitlines()[len(before) :] == before[-1:]


def test_shorthand_of_the_readme(tmp_path: Path) -> None:
    project = copy_of("vision_transformer", tmp_path)
    script = project / "train.py"
    script.write_text("import paca_lightning\n" + script.read_text())
    shorthand = ("--trainer.callbacks+=PaCAStrategy", "--trainer.callbacks.config.r=16")
    printed = python_train(project, "fit", more=(*shorthand, "--trainer.max_epochs=1"))
    assert "Trainable: 7,168 of" in printed  # 16 columns of 8 layers that have 448 rows together
    assert callbacks_of(project / "logs" / "version_0" / "config.yaml") == [
        "ModelCheckpoint",
        "LossNotes",
        "PaCAStrategy",
    ]
    assert all(key.endswith(("paca_delta", "paca_indices")) for key in trained_keys(project / "checkpoints/last.ckpt"))


def test_lightnings_demo_transformer(tmp_path: Path) -> None:
    project = copy_of("demo_transformer", tmp_path)
    (project / "data").mkdir()
    words = [f"w{number % 50}" for number in range(1200)]
    (project / "data" / "wikitext-2.txt").write_text(" ".join(words))
    bounded = ("--trainer.max_steps=8", "--trainer.accelerator=cpu", "--model.vocab_size=64")
    printed = python_train(project, "fit", "qpaca", "adapter", more=bounded)
    assert "out_proj" in printed.partition("Left alone:")[2]  # nn.MultiheadAttention never calls it
    run = project / "lightning_logs" / "version_0"
    keys = trained_keys(next((run / "checkpoints").glob("*.ckpt")))
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in keys} == {"linear1", "linear2", "decoder"}
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 0


def test_fragments_for_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv_folders(tmp_path / "mmlu")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["paca-lightning"])
    fragments = [f"--config={CALLBACKS / name}.yaml" for name in ("throughput", "samples", "mmlu_eval")]
    last = {"source": tmp_path / "mmlu", "max_length": 500, "shots": 1, "limit": 1}
    overrides = [f"--trainer.callbacks.{name}={value}" for name, value in last.items()]
    bounded = ["--trainer.limit_train_batches=4", "--trainer.log_every_n_steps=2", "--trainer.max_epochs=1"]
    output = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    main(["fit", "--config=configs/debug.yaml", *fragments, *overrides, *bounded, *output])
    run = tmp_path / "version_0"
    assert callbacks_of(run / "config.yaml")[-3:] == ["TokenThroughput", "SampleAnswers", "MMLUEvaluation"]
    assert all(value > 0 for value in values_of(run / "metrics.csv", "train/tokens_per_second"))
    assert len(values_of(run / "metrics.csv", "mmlu/accuracy")) >= 1
    answers: list[dict[str, Any]] = json.loads((run / "answers.json").read_text())
    assert [set(answer) for answer in answers] == [{"prompt", "before", "after"}] * 2
    assert list((run / "mmlu").glob("*.json"))
