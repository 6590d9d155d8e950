"""Held-out loss, bytes and time over slow links: DiLoCo and its compressions beside DDP, at equal tokens.

    python -m scripts.slow_networks --model models/SmolLM2-135M-Instruct --output runs/slow-networks

Trains PaCA r 16 on configs/data/quickstart, with frozen weights in bf16 and trained ones in fp32, as docs/learning.md
has it. Replicas take turns on one model in this process: their inner loops one after the other, then the exchange.
tests/strategies/diloco/test_slow_networks.py shows that this gives the bits of replicas that exchange over TCP; to
rounding with more than two and no compression. Bytes are those of the algorithm used. Time is computed: CPU seconds of
a step on one core, times the steps, plus the bytes that a replica sends over the bandwidth of its link, nothing of
which overlaps.

An arm that `results.json` holds is not trained again, so a run that was stopped goes on, and arms may be added:

    python -m scripts.slow_networks --replicas 2 --arms "ddp, other rows" "H=20 top_k, lr 1, momentum 0"

Set OMP_NUM_THREADS=1, or the CPU seconds of a step are those of several threads.
"""

import argparse
import json
import math
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from paca_lightning import PaCAConfig, apply_paca, attach, paca_layers, write_columns
from paca_lightning.strategies.diloco.settings import Compression, Outer
from paca_lightning.tasks import InstructionDataModule
from paca_lightning.tasks.pretrained import build_for_training
from scripts.simulated_replicas import Cluster, ring_bytes

LINKS = {"at 10 Mbit/s": 10.0, "at 100 Mbit/s": 100.0, "unlimited": math.inf}
LORA_RANK = 8  # trains about as many parameters as PaCA r 16
LR, WARMUP, CLIP = 4e-3, 0.1, 1.0  # of configs/study/conversations.yaml


class Task:
    """SmolLM2 with PaCA on the quickstart's conversations."""

    def __init__(self, model: str, batch_size: int, steps: int) -> None:
        torch.manual_seed(0)
        # sdpa's backward in bf16 takes a fifth of a step on a CPU
        self.model = build_for_training(model, dtype="bfloat16", attn_implementation="eager")
        self.full = sum(parameter.numel() for parameter in self.model.parameters())
        apply_paca(self.model, PaCAConfig(r=16))
        self.parameters = [layer.paca_delta for _, layer in paca_layers(self.model)]
        self.lora = LORA_RANK * sum(layer.in_features + layer.out_features for _, layer in paca_layers(self.model))
        files = {name: f"configs/data/quickstart/{name}.jsonl" for name in ("train", "validation")}
        data = InstructionDataModule(model, **files, max_length=128, batch_size=batch_size)
        data.prepare_data()
        data.setup("fit")
        self.train, self.held_out = list(data.train_dataloader()), list(data.val_dataloader())
        self.steps, self.seconds, self.taken = steps, 0.0, 0
        self.order = 0
        """Which order of rows the next training takes."""

    def cluster(self, replicas: int) -> Cluster:
        """Replicas that share the batches."""
        gradients = partial(self._gradients, replicas)
        return Cluster(self.parameters, gradients, self._optimizer, replicas, lambda: write_columns(self.model))

    def _gradients(self, replicas: int, replica: int, step: int) -> None:
        began = time.process_time()
        epoch, place = divmod(step * replicas + replica, len(self.train))
        generator = torch.Generator().manual_seed(1000 * self.order + epoch)
        order = torch.randperm(len(self.train), generator=generator)
        self.model.train()
        self.model.zero_grad()
        loss, tokens = self._loss(self.train[order[place]])
        (loss / tokens).backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.seconds += time.process_time() - began
        self.taken += 1

    def _optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0)
        attach(optimizer, self.model)
        warm = max(1, round(WARMUP * self.steps))
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps - warm)
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        logits = self.model(
            **{name: value for name, value in batch.items() if name != "labels"}, use_cache=False
        ).logits
        labels = batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return loss, int((labels != -100).sum())

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of held-out tokens."""
        self.model.eval()
        losses = [self._loss(batch) for batch in self.held_out]
        return float(sum(loss for loss, _ in losses)) / sum(tokens for _, tokens in losses)


DDP, OTHER_ROWS = "ddp", "ddp, other rows"
ARMS = (
    DDP,
    *(f"H=100 {compression}" for compression in get_args(Compression)),
    *(f"H=100 {compression}, lr 1, momentum 0" for compression in get_args(Compression)),
    "H=20 none",
    "H=20 none, lr 1, momentum 0",
    "H=20 none, lr 0.7, momentum 0.5",
    OTHER_ROWS,
    *(f"H=20 {compression}, lr 1, momentum 0" for compression in get_args(Compression)[1:]),
)
"""What is compared, by name. Those of H=100 take the first rounds of one training, and cost little."""


def outer_of(arm: str) -> Outer | None:
    """The outer loop of an arm; None: plain DDP.

    Raises:
        ValueError: If the name is of another form.
    """
    if arm in (DDP, OTHER_ROWS):
        return None
    parts = re.fullmatch(r"H=(\d+) (\w+)(?:, lr ([\d.]+), momentum ([\d.]+))?", arm)
    if parts is None:
        raise ValueError(f"{arm!r} is no arm: give {DDP!r}, or one such as 'H=20 top_k, lr 1, momentum 0'.")
    every, compression, lr, momentum = parts.groups()
    given = {} if lr is None else {"lr": float(lr), "momentum": float(momentum)}
    return Outer(int(every), compression=compression, **given)  # type: ignore[arg-type]


def measure(task: Task, cluster: Cluster, arm: str, every: int) -> list[dict[str, float]]:
    """Held-out loss and bytes along one training."""
    points, outer = [], outer_of(arm)
    task.order = int(arm == OTHER_ROWS)
    for step, sent in cluster.ddp(task.steps) if outer is None else cluster.diloco(outer, task.steps):
        if outer is not None or step % every == 0 or step == task.steps:
            points.append({"step": step, "bytes": sent, "loss": task.loss()})
    return points


def seconds_to(points: list[dict[str, float]], goal: float, step_seconds: float, megabits: float) -> float | None:
    """Time until a held-out loss is reached, between points by a straight line; None if it is not reached."""
    for before, after in zip([None, *points], points, strict=False):
        if after["loss"] <= goal:
            times = [at["step"] * step_seconds + at["bytes"] * 8e-6 / megabits for at in (before or after, after)]
            share = 1.0 if before is None else (before["loss"] - goal) / (before["loss"] - after["loss"])
            return times[0] + share * (times[1] - times[0])
    return None


def tables(results: dict[str, Any], replicas: int) -> str:
    """A table in Markdown: losses, bytes and times of arms, and bytes of other methods."""
    trained, step_seconds = results[str(replicas)], results["step_seconds"]
    ddp = trained[DDP][-1]
    goal = 1.02 * ddp["loss"]
    slow = list(LINKS)[:2]
    head = [f"{replicas} replicas", "held-out loss", "to DDP's", "MB sent", "DDP's over it"]
    head += [f"time {link}, over that unlimited" for link in slow] + [f"s to {goal:.3f} {link}" for link in LINKS]
    rows = [head, ["---"] * len(head)]
    for name, points in trained.items():
        loss, sent = points[-1]["loss"], points[-1]["bytes"]
        computed = points[-1]["step"] * step_seconds
        times = [seconds_to(points, goal, step_seconds, megabits) for megabits in LINKS.values()]
        row = [
            name,
            f"{loss:.4f}",
            f"{loss / ddp['loss'] - 1:+.2%}",
            f"{sent / 1e6:,.2f}",
            f"{ddp['bytes'] / sent:,.0f}",
            *(f"{1 + sent * 8e-6 / LINKS[link] / computed:.3f}" for link in slow),
        ]
        rows.append(row + ["not reached" if each is None else f"{each:,.0f}" for each in times])
    for name in ("full", "lora"):
        sent = ddp["step"] * ring_bytes(4 * results[name], replicas)
        cells = [f"DDP, {name}", "", "", f"{sent / 1e6:,.0f} computed", f"{ddp['bytes'] / sent:.3f}"]
        rows.append(cells + [""] * (len(head) - len(cells)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(results: dict[str, Any], replicas: list[int], file: Path) -> None:
    """Draw held-out losses over the bytes that each replica has sent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(replicas), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, count in enumerate(replicas, 1):
        axes = figure.add_subplot(1, len(replicas), number, title=f"{count} replicas")
        axes.set(xscale="log", yscale="log", xlabel="MB sent by each replica", ylabel="held-out loss")
        for place, (name, points) in enumerate(results[str(count)].items()):
            megabytes, losses = [at["bytes"] / 1e6 for at in points], [at["loss"] for at in points]
            axes.plot(megabytes, losses, "ovs^D"[place // 10], linestyle="-", markersize=4, label=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    figure.savefig(file, dpi=80)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing in results.json, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/slow-networks"))
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=100, help="of each replica")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a replica's step")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="which to train, in this order")
    given = parser.parse_args(arguments)
    for arm in given.arms:
        outer_of(arm)
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "results.json"
    settings = {"model": given.model, "steps": given.steps, "batch_size": given.batch_size}
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"settings": settings}
    if results["settings"] != settings:
        parser.error(f"{file} is of other settings: {results['settings']}. Give another --output.")
    task = Task(given.model, given.batch_size, given.steps)
    results |= {"full": task.full, "lora": task.lora, "before": task.loss()}
    for replicas in given.replicas:
        done, cluster = results.setdefault(str(replicas), {}), task.cluster(replicas)
        for name in given.arms:
            if name not in done:
                done[name] = measure(task, cluster, name, every=20)
                results.setdefault("step_seconds", task.seconds / max(1, task.taken))
                file.write_text(json.dumps(results, indent=1), encoding="utf-8")
                print(replicas, name, done[name][-1], flush=True)
    for replicas in given.replicas:
        print("\n" + tables(results, replicas))
    plot(results, given.replicas, given.output / "loss-over-bytes.png")


if __name__ == "__main__":
    main()
