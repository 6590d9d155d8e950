"""The fragments in callbacks/, in LightningCLI projects that know nothing of paca_lightning (tests/projects)."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from paca_lightning.cli import main
from tests.artefacts import PNG, logged, trained_layers
from tests.mmlu_files import write_csv_folders
from tests.processes import run

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[1]
CALLBACKS = ROOT / "callbacks"


@dataclass(frozen=True)
class Job:
    """A run of a copy of a project: ``python train.py COMMAND --config config.yaml --config FRAGMENT ... MORE``."""

    project: str
    command: str
    fragments: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    first_line: str = ""  # of train.py, before its own

    def copy_to(self, directory: Path) -> list[str]:
        """Copy the project, and return the arguments of its train.py."""
        shutil.copytree(ROOT / "tests" / "projects" / self.project, directory)
        script = directory / "train.py"
        script.write_text(self.first_line + script.read_text())
        base = ["--config", "config.yaml"] if (directory / "config.yaml").exists() else []
        added = [argument for name in self.fragments for argument in ("--config", str(CALLBACKS / f"{name}.yaml"))]
        return [self.command, *base, *added, *self.more]


JOBS = {
    "trained": Job("vision_transformer", "fit", ("paca", "adapter", "history", "heldout")),
    "evaluated": Job(
        "vision_transformer",
        "validate",
        ("from_adapter",),
        ("--trainer.callbacks.adapter=../trained/logs/version_0/adapter",),
    ),
    "shorthand": Job(
        "vision_transformer",
        "fit",
        more=("--trainer.callbacks+=PaCAStrategy", "--trainer.callbacks.config.r=16", "--trainer.max_epochs=1"),
        first_line="import paca_lightning\n",
    ),
    "demo": Job(
        "demo_transformer",
        "fit",
        ("qpaca", "adapter"),
        ("--trainer.max_steps=8", "--trainer.accelerator=cpu", "--model.vocab_size=64"),
    ),
}


@dataclass(frozen=True)
class Done:
    directory: Path
    printed: str


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """All jobs, run one after the other by one interpreter."""
    root = tmp_path_factory.mktemp("projects")
    arguments = {name: job.copy_to(root / name) for name, job in JOBS.items()}
    words = " ".join(f"w{number % 50}" for number in range(1200))
    (root / "demo" / "data").mkdir()
    (root / "demo" / "data" / "wikitext-2.txt").write_text(words)
    given = json.dumps([(str(root / name), of_it) for name, of_it in arguments.items()])
    command = [sys.executable, str(ROOT / "tests" / "projects" / "run_each.py")]
    ended = run(command, given=given, env={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout.splitlines()[-1])
    return {name: Done(root / name, text) for name, text in zip(JOBS, printed, strict=True)}


def callbacks_of(config: Path) -> list[str]:
    """Names of the callbacks in the config that LightningCLI saved with a run."""
    saved = yaml.safe_load(config.read_text(encoding="utf-8"))
    return [entry["class_path"].rpartition(".")[2] for entry in saved["trainer"]["callbacks"]]


def trained_keys(checkpoint: Path) -> set[str]:
    return set(torch.load(checkpoint, weights_only=True)["state_dict"])


VISION_LAYERS = [f"net.blocks.{i}.{name}" for i in (0, 1) for name in ("mlp.0", "mlp.2", "proj", "qkv")]


def test_the_users_own_callbacks_are_still_there(jobs: dict[str, Done]) -> None:
    project = jobs["trained"].directory
    added = ["PaCAStrategy", "AdapterCheckpoint", "AdapterHistory", "HeldOutLoss", "LossPlot"]
    assert callbacks_of(project / "logs" / "version_0" / "config.yaml") == ["ModelCheckpoint", "LossNotes", *added]
    assert len((project / "notes.txt").read_text().splitlines()) == 4  # one an epoch


def test_checkpoint_holds_the_adapter_alone(jobs: dict[str, Done]) -> None:
    expected = {f"{layer}.{part}" for layer in VISION_LAYERS for part in ("paca_delta", "paca_indices")}
    assert trained_keys(jobs["trained"].directory / "checkpoints" / "last.ckpt") == expected


def test_run_leaves_an_adapter_and_a_plot_and_learns(jobs: dict[str, Done]) -> None:
    logs = jobs["trained"].directory / "logs" / "version_0"
    assert json.loads((logs / "adapter" / "adapter_config.json").read_text())["r"] == 16
    assert trained_layers(logs / "adapter") == VISION_LAYERS
    assert (logs / "loss.png").read_bytes().startswith(PNG)
    losses = logged(logs, "val/loss")
    steps = [point["step"] for point in json.loads((logs / "history" / "history.json").read_text())["points"]]
    assert steps[:3] == [0, 1, 2]
    assert losses[-1] < 0.9 * losses[0]


def test_an_adapter_is_evaluated_in_the_project(jobs: dict[str, Done]) -> None:
    trained, evaluated = ((jobs[name].directory / "notes.txt").read_text() for name in ("trained", "evaluated"))
    assert evaluated.splitlines() == trained.splitlines()[-1:]


def test_shorthand_of_the_readme(jobs: dict[str, Done]) -> None:
    project = jobs["shorthand"].directory
    assert "Trainable: 7,168 of" in jobs["shorthand"].printed  # 16 columns of 8 layers that have 448 rows together
    assert callbacks_of(project / "logs" / "version_0" / "config.yaml") == [
        "ModelCheckpoint",
        "LossNotes",
        "PaCAStrategy",
    ]
    assert all(key.endswith(("paca_delta", "paca_indices")) for key in trained_keys(project / "checkpoints/last.ckpt"))


def test_lightnings_demo_transformer(jobs: dict[str, Done]) -> None:
    # nn.MultiheadAttention never calls out_proj, and the decoder is the output head.
    left_alone = jobs["demo"].printed.partition("Left alone:")[2]
    assert "out_proj" in left_alone
    assert "decoder: output head." in left_alone
    version = jobs["demo"].directory / "lightning_logs" / "version_0"
    keys = trained_keys(next((version / "checkpoints").glob("*.ckpt")))
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in keys} == {"linear1", "linear2"}
    assert {path.rpartition(".")[2] for path in trained_layers(version / "adapter")} == {"linear1", "linear2"}


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
    version = tmp_path / "version_0"
    assert callbacks_of(version / "config.yaml")[-3:] == ["TokenThroughput", "SampleAnswers", "MMLUEvaluation"]
    assert len(logged(version, "train/tokens_per_second")) == 2  # four steps, logged every second
    assert [len(logged(version, f"mmlu/{name}")) for name in ("before/accuracy", "accuracy")] == [1, 1]
    answers: list[dict[str, Any]] = json.loads((version / "answers.json").read_text())
    assert [set(answer) for answer in answers] == [{"prompt", "before", "after"}] * 2
    files = sorted(path.name for path in (version / "mmlu").glob("*.json"))
    assert files == ["before-step=000000.json", "validate-step=000004.json"]
