"""Preferences on two gloo processes against one: data parallel, and sharded."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from paca_lightning import PaCAConfig, PaCAStrategy, paca_layers
from paca_lightning.tasks import PreferenceDataModule, PreferenceModule
from tests.distributed_launch import launch
from tests.tasks.preferences import labelled, pairs
from tests.tasks.rows import write_rows
from tests.tasks.runs import adamw
from tests.tiny import tiny_model_directory

pytestmark = pytest.mark.distributed
# Loss, whether its reference is cached, and the strategy.
RUNS = [("kto", False, "ddp"), ("dpo", False, "paca_fsdp2"), ("dpo", True, "paca_fsdp2")]


def fit(directory: Path, loss: Any, cached: bool, strategy: str, devices: int, **settings: Any) -> tuple[Any, ...]:
    """Logged losses and the deltas after two epochs, with two rows a step on all ranks together."""
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        num_sanity_val_steps=0,
        **{"enable_checkpointing": False, "callbacks": []} | settings,
    )
    trainer.callbacks.append(PaCAStrategy(PaCAConfig(r=4)))
    module = PreferenceModule(str(directory / "model"), loss=loss, cache_reference=cached, optimizer=adamw(1e-2))
    train, validation = (str(directory / f"{loss}-{name}.jsonl") for name in ("train", "validation"))
    data = PreferenceDataModule(
        str(directory / "model"),
        train,
        validation=validation,
        batch_size=2 // devices,
        cache_dir=str(directory / "cache"),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    # The loss of KTO depends on who shares a batch.
    names = ("val/rewards/chosen", "val/rewards/rejected", *(["val/loss"] if loss == "dpo" else []))
    logged = trainer.callback_metrics
    return {name: logged[name].item() for name in names if name in logged}, [
        getattr(delta := layer.paca_delta.detach(), "full_tensor", lambda d=delta: d)().clone()
        for _, layer in paca_layers(module)
    ]


def on_two_ranks(directory: Path) -> list[Any]:
    found = [fit(directory, *run, 2) for run in RUNS]
    saving = ModelCheckpoint(directory, "half", every_n_train_steps=2)
    settings = {"callbacks": [saving], "enable_checkpointing": True, "max_steps": 2}
    fit(directory, *RUNS[2], 2, **settings)
    return [*found, fit(directory, *RUNS[2], 2, ckpt_path=str(directory / "half.ckpt"))]


def assert_same(found: tuple[dict[str, float], list[Tensor]], expected: tuple[dict[str, float], list[Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-4)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one - other).abs().max() < 2e-3  # of 0.08, which Adam moves a column in eight steps


@pytest.mark.slow
def test_two_ranks_train_as_one_and_resume(tmp_path: Path) -> None:
    tiny_model_directory(tmp_path / "model")
    for loss, rows in (("dpo", pairs), ("kto", labelled)):
        write_rows(tmp_path / f"{loss}-train.jsonl", rows(8))
        write_rows(tmp_path / f"{loss}-validation.jsonl", rows(5))  # the last step has fewer rows than ranks
    alone = [fit(tmp_path, *run, 1) for run in RUNS]
    for *ranks, resumed in launch(on_two_ranks, 2, tmp_path):
        for found, expected in zip(ranks, alone, strict=True):
            assert_same(found, expected)
        assert_same(resumed, ranks[2])
