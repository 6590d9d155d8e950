"""PEFTStrategy on two processes: the same training as on one, one adapter, and a bitwise resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from paca_lightning import AdapterCheckpoint, PEFTStrategy
from tests.callbacks.test_peft_strategy import TOKENS, Module, fit, lora
from tests.distributed_launch import launch

pytestmark = pytest.mark.distributed


class Sharded(Module):
    """Each rank reads its own rows, so that a step sees the same 8 rows on any number of processes."""

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size
        return DataLoader(TOKENS[self.global_rank :: world], batch_size=8 // world)


def run(directory: Path, *callbacks: Any, epochs: int = 2, ckpt_path: Path | None = None, **settings: Any) -> None:
    saving = AdapterCheckpoint(str(directory / "adapter"))
    settings |= {"max_epochs": epochs, "use_distributed_sampler": False}
    fit(Sharded(), directory, PEFTStrategy(lora()), saving, *callbacks, ckpt_path=ckpt_path, **settings)


def stop_and_resume(directory: Path) -> None:
    """On each of two ranks: two epochs, and the second one again from the checkpoint of the first."""
    two = {"strategy": "ddp", "devices": 2}
    each = ModelCheckpoint(directory, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    run(directory / "two", each, **two)
    run(directory / "resumed", ckpt_path=directory / "0.ckpt", **two)


def test_ddp_equals_one_process_and_resumes_bitwise(tmp_path: Path) -> None:
    run(tmp_path / "one", devices=1)
    launch(stop_and_resume, 2, tmp_path)
    one, two, resumed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two", "resumed")
    )
    assert one.keys() == two.keys() == resumed.keys()
    for name, value in one.items():
        # Two halves of a batch are summed in another order than the whole; Adam's first steps enlarge the rounding.
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)
        assert torch.equal(resumed[name], two[name])
    state = torch.load(tmp_path / "0.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in key for key in state)
