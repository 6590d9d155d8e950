"""What ideas would give PaCA: runs of a config as `paca-lightning compare` makes them, with one idea in each.

    python -m scripts.study_ideas --config configs/study/gsm8k.yaml --runs paca:16,lr=5.66e-3 redraw-10:5.66e-3

A run is IDEA:LR, or a method as `compare` takes it. All see the same rows in the same order. Prints the held-out loss
of each and its difference to the first one, by seed. The same command goes on where it was stopped. docs/learning.md
has what came out.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from typing_extensions import override

from paca_lightning import apply_paca, paca_layers
from paca_lightning.conversion.scores import calibrate
from paca_lightning.core.files import replacing
from paca_lightning.tools.compare.driver import run_all
from paca_lightning.tools.compare.methods import Method, PaCAMethod
from paca_lightning.tools.compare.parsing import parse_method
from paca_lightning.tools.compare.runs import MethodRuns, Plan, metric_of
from paca_lightning.tools.compare.search import Space
from paca_lightning.tools.compare.task import Settings, Task, read_task, replaced
from scripts.first_batches import first_training_batches

METRIC = "val/loss"


@dataclass(frozen=True)
class Idea(PaCAMethod):
    """PaCA with an idea.

    Attributes:
        callback: What carries it out, as a config has it; None: PaCA's own options say it.
        seeded: Whether the callback has a seed.
        optimizer: What takes the place of the run's optimizer, without its learning rate; None: nothing does.
        by_gradient: Whether layers share the columns by their gradients.
    """

    callback: Settings | None = field(default=None, compare=False)
    seeded: bool = False
    optimizer: Settings | None = field(default=None, compare=False)
    by_gradient: bool = False

    @override
    def callbacks(self, task: Task, seed: int) -> list[Settings]:
        first = super().callbacks(task, seed)
        if self.callback is None:
            return first
        own: Settings = {"seed": seed} if self.seeded else {}
        return [*first, self.callback | {"init_args": self.callback.get("init_args", {}) | own}]

    @override
    def changed(self, settings: Settings, task: Task) -> Settings:
        if self.optimizer is None:
            return settings
        *place, _, name = task.lr_key  # ..., "optimizer", "init_args", "lr"
        lr: Any = settings
        for key in task.lr_key:
            lr = lr[key]
        init_args = self.optimizer["init_args"] | {name: lr}
        return replaced(settings, tuple(place), self.optimizer | {"init_args": init_args})


MUON: Settings = {
    "class_path": "torch.optim.Muon",
    "init_args": {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
}
# On the side of the columns alone, as max_precondition_dim is below the outputs of each layer.
SOAP: Settings = {
    "class_path": "pytorch_optimizer.SOAP",
    "init_args": {
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "shampoo_beta": 0.95,
        "precondition_frequency": 5,
        "max_precondition_dim": 64,
    },
}


def callback(name: str, **init_args: Any) -> Settings:
    """A callback of scripts/ideas.py, as a config has it."""
    return {"class_path": f"scripts.ideas.{name}", "init_args": init_args}


IDEAS: dict[str, Callable[[str, Space], Idea]] = {
    "redraw-10": lambda label, lr: Idea(label, lr, callback=callback("RedrawColumns", every=10), seeded=True),
    "redraw-25": lambda label, lr: Idea(label, lr, callback=callback("RedrawColumns", every=25), seeded=True),
    "whitened": lambda label, lr: Idea(label, lr, callback=callback("WhitenedColumns")),
    "eigenbasis-adam": lambda label, lr: Idea(label, lr, callback=callback("EigenbasisAdam")),
    "soap": lambda label, lr: Idea(label, lr, optimizer=SOAP),
    "muon": lambda label, lr: Idea(label, lr, optimizer=MUON),
    "gradient-ranks": lambda label, lr: Idea(label, lr, by_gradient=True),
}
"""By name. What PaCA's own options say is a method of `compare`, such as paca:72,target_modules=[o_proj,down_proj]."""


def parse_run(text: str, task: Task, cache: Path) -> Method:
    """The method and the learning rate that a user writes as ``IDEA:LR``, or as ``compare`` takes it with an lr."""
    name, _, rate = text.rpartition(":")
    if name not in IDEAS:
        method = parse_method(text)
        assert method.space is not None, f"{text!r} needs lr=..."
        return method
    idea = IDEAS[name](text.replace(":", " "), Space(float(rate), float(rate)))
    if not idea.by_gradient:
        return idea
    ranks = gradient_ranks(task, cache / "ranks.json")
    return Idea(idea.label, idea.space, options={"rank_pattern": ranks})


def gradient_ranks(task: Task, path: Path) -> dict[str, int]:
    """Ranks by layer at the trained parameters of the run's PaCA, in proportion to the rms of each weight's gradient.

    Args:
        task: Its first training batches are looked at.
        path: Keeps them.
    """
    if not path.exists():
        settings = task.settings["model"]["init_args"]
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
        apply_paca(model, task.paca)
        layers = dict(paca_layers(model))
        scores = calibrate(model, layers, "gradient_norm", first_training_batches(task))
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        squares = {name: float(score.sum()) for name, score in scores.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(share_ranks(squares, shapes, task.paca.r), indent=1))
    ranks: dict[str, int] = json.loads(path.read_text())
    return ranks


def share_ranks(squares: dict[str, float], shapes: dict[str, tuple[int, int]], r: int) -> dict[str, int]:
    """Ranks in proportion to the rms of each weight's gradient, at about the parameters that a common rank trains.

    Args:
        squares: Squared norm of each weight's gradient.
        shapes: (out_features, in_features) of each weight.
        r: The common rank. Ranks lie between 1 and 8 times as much.
    """
    rms = {name: (squares[name] / (shapes[name][0] * shapes[name][1])) ** 0.5 for name in shapes}
    budget = r * sum(out for out, _ in shapes.values())

    def ranks(unit: float) -> dict[str, int]:
        return {name: min(max(1, round(unit * rms[name])), 8 * r, shapes[name][1]) for name in shapes}

    low, high = 0.0, 64 * r / min(value for value in rms.values() if value > 0)
    for _ in range(60):
        middle = (low + high) / 2
        spent = sum(rank * shapes[name][0] for name, rank in ranks(middle).items())
        low, high = (middle, high) if spent < budget else (low, middle)
    return ranks(low)


def table(runs: Sequence[MethodRuns]) -> list[str]:
    """A line for each method: its held-out loss and its difference to the first method's, by seed."""
    losses = [{trial.seed: metric_of(trial.result, METRIC) for trial in one.reported} for one in runs]
    return [
        f"{one.method.label:<40} {'  '.join(_cell(loss, losses[0].get(seed)) for seed, loss in found.items())}"
        for one, found in zip(runs, losses, strict=True)
    ]


def _cell(loss: float | None, reference: float | None) -> str:
    if loss is None:
        return "diverged, or not run"
    return f"{loss:.4f}" if reference is None else f"{loss:.4f} ({loss - reference:+.4f})"


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="IDEA:LR", help=f"ideas: {', '.join(IDEAS)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds 1, 2, ... (default: 1)")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--output", type=Path, default=Path("runs/ideas"))
    known, overrides = parser.parse_known_args()
    task = read_task([f"--config={known.config}", *overrides], Path(known.config).stem, None, "study_ideas")
    directory = known.output / task.name
    methods = [parse_run(text, task, directory) for text in known.runs]
    runs = [MethodRuns(task, method, Plan(metric=METRIC, seeds=known.seeds), directory) for method in methods]
    run_all(runs, jobs=1, metric=METRIC, minutes=known.minutes)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
