"""One run of a comparison: its config, its directory, its result."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paca_lightning.core.files import replacing
from paca_lightning.tools.compare.methods import Method
from paca_lightning.tools.compare.task import METHODS, Settings, Task, replaced, short_name

CONFIG, RESULT, LOG = "config.yaml", "result.json", "log.txt"
RECORDER = "paca_lightning.tools.compare.recorder.TrialRecorder"
LEFT_OUT = (
    "AdapterCheckpoint",
    "AdapterHistory",
    "EarlyStopping",
    "HeldOutLoss",
    "LossPlot",
    "ModelCheckpoint",
    "SampleAnswers",
    "TokenThroughput",
)
"""Callbacks of a run that only show or save, and EarlyStopping, as all methods take the same steps."""

WHILE_SEARCHING = {"MMLUEvaluation": {"limit": 1, "baseline": False}}
"""Settings of callbacks that spare time where only the metric counts."""

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run of a method on a task.

    Attributes:
        method: What is trained.
        lr: Learning rate.
        seed: Of everything that is drawn.
        searching: Whether it is a trial of the search, or one of the runs that are reported.
        settings: The whole config of its run, but for the recorder.
        directory: Where its files are. The name ends with a hash of the settings, so that a result is never taken for
            that of another run.
    """

    method: Method
    lr: float
    seed: int
    searching: bool
    settings: Settings
    directory: Path

    @property
    def label(self) -> str:
        """For people."""
        purpose = "search" if self.searching else f"seed {self.seed}"
        return f"{self.method.label}, lr {self.lr:g}, {purpose}"

    @property
    def result(self) -> Result | None:
        """What its run has recorded, once it is finished."""
        path = self.directory / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def summary(self) -> Result:
        """Its seed, its directory and its result, if it is finished."""
        return {"seed": self.seed, "lr": self.lr, "directory": str(self.directory), **(self.result or {})}

    def write(self, metric: str) -> Path:
        """Write its config, and return the path."""
        self.directory.mkdir(parents=True, exist_ok=True)
        recorder = {"class_path": RECORDER, "init_args": {"path": str(self.directory / RESULT), "metric": metric}}
        trainer = self.settings["trainer"]
        settings = self.settings | {"trainer": trainer | {"callbacks": [*trainer["callbacks"], recorder]}}
        path = self.directory / CONFIG
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return path


def make_trial(
    task: Task, method: Method, lr: float, seed: int, *, searching: bool, steps: int | None, metric: str, parent: Path
) -> Trial:
    """A trial.

    Args:
        task: The run.
        method: What is trained.
        lr: Learning rate.
        seed: Of everything that is drawn.
        searching: Whether it belongs to the search.
        steps: Optimizer steps. None: as the config says.
        metric: What is compared.
        parent: Directory of the task.
    """
    settings = method.changed(replaced(task.settings, task.lr_key, lr), task)
    for key in task.seed_keys:
        settings = replaced(settings, key, seed)
    callbacks = [
        entry
        for entry in settings["trainer"]["callbacks"]
        if short_name(entry) not in (*LEFT_OUT, *(METHODS if method.replaces else ()))
    ]
    if searching and not metric.startswith("mmlu/"):
        callbacks = [
            entry | {"init_args": entry.get("init_args", {}) | WHILE_SEARCHING.get(short_name(entry), {})}
            for entry in callbacks
        ]
    changes: Settings = {
        "callbacks": [*method.callbacks(task, seed), *callbacks],
        "num_sanity_val_steps": 0 if searching else -1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if steps is not None:
        changes |= {"max_steps": steps, "max_epochs": -1}
    settings = settings | {"trainer": settings["trainer"] | changes}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{'search' if searching else f'seed-{seed}'}-lr-{lr:g}-{digest}"
    directory = parent / method.slug / name
    # Metrics, and whatever else a run writes, lie beside its result.
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(directory), "name": ""},
    }
    settings["trainer"] |= {"default_root_dir": str(directory), "logger": logger}
    return Trial(method=method, lr=lr, seed=seed, searching=searching, settings=settings, directory=directory)
