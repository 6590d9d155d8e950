"""PaCATrainerCallback in Hugging Face's Trainer on two processes: equal to one, saved once, resumed bitwise."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paca_lightning import load_adapter
from tests.callbacks.test_hf_trainer import deltas, logits, same, trainer_of
from tests.callbacks.test_paca import in_step
from tests.distributed_launch import launch
from tests.tiny import tiny_llama

pytestmark = [pytest.mark.distributed, pytest.mark.guests]
STEPS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_grad_norm": 0,
    "optim": "sgd",
    "learning_rate": 0.5,
}


def run(path: Path, *, rows_a_step: int = 2, checkpoint: str | None = None) -> dict[str, Any]:
    settings = STEPS | {"per_device_train_batch_size": rows_a_step}
    if "RANK" in os.environ:
        settings["ddp_backend"] = "gloo"
    trainer = trainer_of(path, model=tiny_llama(), **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "deltas": deltas(model),
        "in_step": in_step(model),
        "logits": logits(model),
        "ranks": trainer.args.world_size,
    }


def runs(path: Path) -> list[dict[str, Any]]:
    """A run, and one that is resumed from its middle."""
    whole = run(path / "whole")
    return [whole, run(path / "resumed", checkpoint=str(path / "whole" / "checkpoint-2"))]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    path = tmp_path_factory.mktemp("ranks")
    return path, launch(runs, 2, path)


def test_two_ranks_train_alike_and_as_one_process(two_ranks: Any, tmp_path: Path) -> None:
    _, ((first, _), (second, _)) = two_ranks
    alone = run(tmp_path, rows_a_step=4)
    assert (first["ranks"], alone["ranks"]) == (2, 1)
    assert first["in_step"]
    assert second["in_step"]
    assert same(first["deltas"], second["deltas"])
    moved: list[Tensor] = list(alone["deltas"].values())
    assert all(delta.any() for delta in moved)
    torch.testing.assert_close(first["deltas"], alone["deltas"], rtol=1e-4, atol=1e-6)  # sums in another order


def test_a_run_of_two_ranks_resumes_bitwise(two_ranks: Any) -> None:
    _, results = two_ranks
    for whole, resumed in results:
        assert same(resumed["deltas"], whole["deltas"])
        assert resumed["in_step"]


@pytest.mark.parametrize("name", ["adapter", "checkpoint-4"])
def test_the_adapter_of_two_ranks_is_saved_once(name: str, two_ranks: Any) -> None:
    path, ((whole, _), _) = two_ranks
    model = tiny_llama()
    load_adapter(model, path / "whole" / name)
    assert torch.equal(logits(model), whole["logits"])
