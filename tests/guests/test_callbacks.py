"""Lightning's callbacks beside PaCAStrategy: the run trains, and the weights follow the deltas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning import (
    AdapterCheckpoint,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    load_adapter,
    paca_layers,
    save_adapter,
    unload,
)
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


class Backbone(Module):
    """A backbone that Lightning's callback thaws, and a head of which PaCA trains columns."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        del self.net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch)).square().mean()

    validation_step = None  # type: ignore[assignment]


def backbone_run(path: Path, config: PaCAConfig, *callbacks: pl.Callback, ckpt_path: Path | None = None) -> Backbone:
    module = Backbone()
    saving = lightning.ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, default_root_dir=path, logger=False, enable_progress_bar=False,
        callbacks=[PaCAStrategy(config), saving, *callbacks],
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, batch_size=4), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return module


def same(first: pl.LightningModule, second: pl.LightningModule) -> bool:
    """Whether two modules hold the same weights, whichever of their parameters are PaCA's."""
    own = second.state_dict()
    return all(torch.equal(tensor, own[name]) for name, tensor in first.state_dict().items())


def test_a_backbone_that_is_thawed_later_is_saved_and_given_back(tmp_path: Path) -> None:
    config = PaCAConfig(r=4, modules_to_save=["head.2"])
    module = backbone_run(tmp_path, config, lightning.BackboneFinetuning(1))
    assert [path for path, _ in paca_layers(module)] == ["head.0"]
    thawed = {"backbone.0.weight", "backbone.0.bias"}
    saved = [set(torch.load(tmp_path / f"epoch={epoch}.ckpt")["state_dict"]) for epoch in (0, 1)]
    assert [thawed & names for names in saved] == [set(), thawed]

    resumed = backbone_run(
        tmp_path / "resumed", config, lightning.BackboneFinetuning(1), ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    assert same(module, resumed)
    base = Backbone()
    assert not torch.equal(base.backbone[0].weight, module.backbone[0].weight)
    save_adapter(module, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    assert same(module, base)
    converted = Backbone()  # whose backbone nobody froze
    pl.Trainer(
        accelerator="cpu", max_epochs=0, logger=False, enable_checkpointing=False,
        callbacks=[PaCAStrategy(adapter=str(tmp_path / "adapter"))],
    ).fit(converted, DataLoader(DATA))  # fmt: skip  # type: ignore[arg-type]
    assert [path for path, _ in paca_layers(converted)] == ["head.0"]
    assert same(module, converted)
    assert same(unload(module), Backbone())


def test_a_backbone_of_which_paca_trains_columns_is_not_thawed(tmp_path: Path) -> None:
    config = PaCAConfig(r=4, target_modules=["backbone.0"])
    with pytest.raises(PaCAError, match=r"BackboneFinetuning thaws every weight of `backbone`.*'backbone\.0' \(1 such"):
        backbone_run(tmp_path, config, lightning.BackboneFinetuning(1))


def test_pruning_a_layer_that_paca_trains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"ModelPruning would put a mask on 'backbone\.0' \(2 such layers\)"):
        backbone_run(tmp_path, PaCAConfig(r=4), lightning.ModelPruning("l1_unstructured"))


class PrunesTheHead(lightning.ModelPruning):
    """Prunes a layer that PaCA leaves alone."""

    def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
        """The last layer."""
        return [(module, name) for module, name in parameters_to_prune if module.out_features == 4]


@pytest.mark.filterwarnings("ignore:The output head 'head.2' is frozen")
def test_pruning_another_layer_is_none_of_pacas_business(tmp_path: Path) -> None:
    module = backbone_run(tmp_path, PaCAConfig(r=4), PrunesTheHead("l1_unstructured"))
    assert is_written(module)
    assert int((module.head[2].weight == 0).sum()) >= 16  # half of 32
