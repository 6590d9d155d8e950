"""Ten thousand optimizer steps of a tiny model: memory, open files, and the calls and time of a step stay as they are.

python -m tests.reliability.many_steps --steps 10000
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAStrategy
from tests.distributed_training import TinyChat
from tests.reliability.call_count import CallCount


class Watch(Callback):
    """Notes memory, open files, the calls of the last step and the median step time of each tenth of a run.

    A machine's cores may vary by more than a step grows; how many functions a step calls does not.
    """

    def __init__(self, steps: int) -> None:
        self.tenth = steps // 10
        self.process = psutil.Process(os.getpid())
        self.rows: list[dict[str, float]] = []
        self.times: list[float] = []
        self.began = 0.0
        self.calls = CallCount()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if (trainer.global_step + 1) % self.tenth == 0:
            self.calls.start()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.calls.stop()
        self.times.append(time.perf_counter() - self.began)
        if trainer.global_step % self.tenth == 0:
            gc.collect()
            row = {
                "step": trainer.global_step,
                "mib": round(self.process.memory_info().rss / 2**20, 1),
                "files": self.process.num_fds(),
                "calls": self.calls.count,
                "ms": round(1000 * statistics.median(self.times), 3),
            }
            self.rows.append(row)
            print(json.dumps(row), flush=True)
            self.times.clear()


def train(steps: int, directory: Path) -> list[dict[str, float]]:
    """Train, with a checkpoint and a validation now and then. Returns a row for each tenth."""
    watch = Watch(steps)
    callbacks = [
        PaCAStrategy(PaCAConfig(r=4)),
        AdapterCheckpoint(monitor="loss", dirpath=str(directory / "adapter")),
        ModelCheckpoint(directory, every_n_train_steps=max(steps // 20, 1), save_last=True),
        watch,
    ]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=1,
        check_val_every_n_epoch=10,
        callbacks=callbacks,
        logger=False,
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = TinyChat(num_hidden_layers=1, hidden_size=32)
    trainer.fit(module, val_dataloaders=torch.utils.data.DataLoader(torch.randint(0, 383, (4, 16)), batch_size=4))
    return watch.rows


def main() -> None:
    """Exit code 1 if memory or the calls of a step grew by over 1% after the first tenth, or a file stayed open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    with tempfile.TemporaryDirectory() as directory:
        rows = train(parser.parse_args().steps, Path(directory))
    first, last = rows[0], rows[-1]
    ratios = {name: last[name] / first[name] for name in ("mib", "calls", "ms")}
    print(f"memory x {ratios['mib']:.4f}, calls of a step x {ratios['calls']:.4f}, step time x {ratios['ms']:.3f}")
    raise SystemExit(int(ratios["mib"] > 1.01 or ratios["calls"] > 1.01 or last["files"] > first["files"]))


if __name__ == "__main__":
    main()
