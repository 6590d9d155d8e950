"""A head over labels on two sharded ranks, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAStrategy
from paca_lightning.tasks import ClassificationDataModule, ClassifierModule
from tests.distributed_launch import launch
from tests.tasks.runs import adamw, trainer
from tests.tasks.test_classifier import rows_of, written
from tests.tiny import tiny_model_directory

pytestmark = pytest.mark.distributed


def fit(directory: Path, file: str, devices: int) -> dict[str, float]:
    """What validation logs; the adapter goes to a directory of that many devices."""
    data = ClassificationDataModule(str(directory), file, file, batch_size=4 // devices)
    module = ClassifierModule(str(directory), optimizer=adamw(1e-2))
    saving: list[Any] = [AdapterCheckpoint(str(directory / f"adapter-{devices}"))]
    run = trainer(
        directory / f"run-{devices}",
        callbacks=[*saving, PaCAStrategy(PaCAConfig(r=4))],
        devices=devices,
        strategy="paca_fsdp2" if devices > 1 else "auto",
        max_epochs=2,
    )
    run.fit(module, datamodule=data)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_two_sharded_ranks_train_a_head_as_one_process(tmp_path: Path) -> None:
    directory = tiny_model_directory(tmp_path / "tiny")
    file = written(tmp_path / "rows.jsonl", rows_of("sequence"))
    expected = fit(directory, file, 1)
    first, second = launch(fit, 2, directory, file, 2)
    assert first == second
    for name in ("val/loss", "val/accuracy", "val/f1"):
        assert first[name] == pytest.approx(expected[name], rel=1e-4)
    one, two = (load_file(tmp_path / "tiny" / f"adapter-{n}" / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert "base_model.model.score.weight" in one
    for name, tensor in one.items():
        # Gradients are summed in another order: rounding of fp32.
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
