"""Inserted methods on two processes: the same training as on one, one adapter, and a bitwise resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset

from paca_lightning import AdapterCheckpoint
from tests.callbacks.test_inserted_methods import METHODS, Answers
from tests.callbacks.test_peft_strategy import TOKENS, fit
from tests.distributed_launch import launch

pytestmark = pytest.mark.distributed


class Sharded(Answers):
    """Each rank reads its own rows, so that a step sees the same 8 rows on any number of processes."""

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size
        rows = Subset(super().train_dataloader().dataset, range(self.global_rank, len(TOKENS), world))
        return DataLoader(rows, batch_size=8 // world)


def run(method: str, directory: Path, *callbacks: Any, ckpt_path: Path | None = None, **settings: Any) -> None:
    saving = AdapterCheckpoint(str(directory / "adapter"))
    settings |= {"use_distributed_sampler": False}
    fit(Sharded(), directory, METHODS[method](), saving, *callbacks, ckpt_path=ckpt_path, **settings)


def stop_and_resume(directory: Path) -> None:
    """On each of two ranks: two epochs of each method, and the second one again from the checkpoint of the first."""
    two = {"strategy": "ddp", "devices": 2}
    for method in ("houlsby", "loreft"):
        own = directory / method
        each = ModelCheckpoint(own, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
        run(method, own / "two", each, **two)
        run(method, own / "resumed", ckpt_path=own / "0.ckpt", **two)


def test_ddp_equals_one_process_and_resumes_bitwise(tmp_path: Path) -> None:
    launch(stop_and_resume, 2, tmp_path)
    for method in ("houlsby", "loreft"):
        own = tmp_path / method
        run(method, own / "one", devices=1)
        one, two, resumed = (
            load_file(own / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two", "resumed")
        )
        assert one.keys() == two.keys() == resumed.keys()
        for name, value in one.items():
            # Two halves of a batch are summed in another order than the whole; Adam's first steps enlarge the rounding.
            torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-2)
            assert torch.equal(resumed[name], two[name])
