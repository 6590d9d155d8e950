"""Lightning's callbacks beside PaCAStrategy: the run trains, and the weights follow the deltas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning
from torch import Tensor
from torch.utils.data import DataLoader

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAStrategy, load_adapter, paca_layers
from tests.callbacks.test_paca import DATA, Module
from tests.guests.checks import is_written

pytestmark = pytest.mark.guests


class Finetuning(lightning.BaseFinetuning):
    """Thaws a bias after an epoch; the deltas train from the start."""

    def freeze_before_training(self, pl_module: Any) -> None:
        """Leave frozen what PaCA froze."""

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        """Thaw a bias after the first epoch."""
        if epoch == 1:
            pl_module.net[0].bias.requires_grad_(True)
            optimizer.add_param_group({"params": [pl_module.net[0].bias]})


CALLBACKS: dict[str, Callable[[Path], list[pl.Callback]]] = {
    "ModelCheckpoint": lambda path: [lightning.ModelCheckpoint(path, monitor="val/loss", save_last=True)],
    "EarlyStopping": lambda _: [lightning.EarlyStopping("val/loss", patience=1)],
    "LearningRateMonitor": lambda _: [lightning.LearningRateMonitor("step")],
    "LearningRateFinder": lambda _: [lightning.LearningRateFinder(num_training_steps=5, early_stop_threshold=None)],
    "BatchSizeFinder": lambda _: [lightning.BatchSizeFinder(max_trials=1, steps_per_trial=1)],
    "GradientAccumulationScheduler": lambda _: [lightning.GradientAccumulationScheduler({0: 1, 1: 2})],
    "BaseFinetuning": lambda _: [Finetuning()],
    "EMAWeightAveraging": lambda _: [lightning.EMAWeightAveraging(decay=0.5)],
    "StochasticWeightAveraging": lambda _: [lightning.StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
    "WeightAveraging": lambda _: [lightning.WeightAveraging()],
    "Timer": lambda _: [lightning.Timer("00:01:00:00")],
    "ModelSummary": lambda _: [lightning.ModelSummary(2)],
    "RichModelSummary and RichProgressBar": lambda _: [lightning.RichModelSummary(), lightning.RichProgressBar()],
    "TQDMProgressBar": lambda _: [lightning.TQDMProgressBar()],
    "LambdaCallback": lambda _: [lightning.LambdaCallback(on_train_start=lambda *_: None)],
    "PredictionWriter": lambda path: [Writer(path)],
    "AdapterCheckpoint": lambda path: [AdapterCheckpoint(str(path / "adapter"), monitor="val/loss")],
}


class Writer(lightning.BasePredictionWriter):
    """Somebody's writer of predictions."""

    def __init__(self, path: Path) -> None:
        super().__init__("epoch")
        self.path = path

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        """Write them all."""
        torch.save(torch.cat(predictions), self.path / "predictions.pt")


class Sized(Module):
    """With a learning rate and a batch size that finders may set."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-2, 4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(DATA, batch_size=self.batch_size)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(DATA, batch_size=8)  # type: ignore[arg-type]

    predict_dataloader = val_dataloader


def trainer_with(path: Path, *callbacks: pl.Callback) -> pl.Trainer:
    logs = any(isinstance(callback, lightning.LearningRateMonitor) for callback in callbacks)
    logger = pl.loggers.CSVLogger(path) if logs else False
    return pl.Trainer(
        accelerator="cpu", max_epochs=3, default_root_dir=path, logger=logger, log_every_n_steps=1,
        enable_checkpointing=any(isinstance(callback, lightning.Checkpoint) for callback in callbacks),
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), *callbacks],
    )  # fmt: skip


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_beside_paca(name: str, tmp_path: Path) -> None:
    module = Sized()
    base = module.net[0].weight.clone()
    trainer = trainer_with(tmp_path, *CALLBACKS[name](tmp_path))
    trainer.fit(module)
    assert is_written(module)
    assert all(layer.paca_delta.any() for _, layer in paca_layers(module))
    assert not torch.equal(module.net[0].weight, base)
    if name == "PredictionWriter":
        trainer.predict(module)
        assert torch.equal(torch.load(tmp_path / "predictions.pt"), module.net(DATA))
    if name == "AdapterCheckpoint":
        loaded = Sized()
        load_adapter(loaded, tmp_path / "adapter")
        assert is_written(loaded)
