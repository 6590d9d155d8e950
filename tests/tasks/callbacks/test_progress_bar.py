import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from paca_lightning.tasks import EpochProgressBar
from paca_lightning.tools.run_config import lightning_cli


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Shown(Callback):
    """What the bar says at each epoch's last batch."""

    def __init__(self):
        self.lines = []

    def on_train_epoch_end(self, trainer, pl_module):
        bar = trainer.progress_bar_callback.train_progress_bar
        self.lines.append((bar.description.split("]")[-1].strip(), bar.completed, bar.total))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1)


def shown(tmp_path, *callbacks, ckpt_path=None, data=None, **settings):
    """Description, batches done and batches in all, at the end of each epoch of 5 batches."""
    record = Shown()
    trainer = Trainer(
        callbacks=[EpochProgressBar(), record, *callbacks],
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(Regression(), DataLoader(torch.zeros(5, 1)) if data is None else data, ckpt_path=ckpt_path)
    return record.lines


def test_max_steps_gives_the_true_number_of_epochs(tmp_path):
    assert shown(tmp_path, max_steps=12) == [("Epoch 0/2", 5, 5), ("Epoch 1/2", 5, 5), ("Epoch 2/2", 2, 2)]


def test_accumulated_batches_are_counted_as_batches(tmp_path):
    lines = shown(tmp_path, max_steps=4, accumulate_grad_batches=2)
    assert lines == [("Epoch 0/1", 5, 5), ("Epoch 1/1", 2, 2)]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_run_resumed_in_mid_epoch_goes_on_in_its_epoch(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, filename="stopped", every_n_train_steps=1)
    shown(tmp_path, checkpoints, max_steps=7)
    again = ModelCheckpoint(tmp_path, filename="again", every_n_train_steps=1)
    lines = shown(tmp_path, again, ckpt_path=tmp_path / "stopped.ckpt", max_steps=14)
    assert lines == [("Epoch 1/2", 5, 5), ("Epoch 2/2", 4, 4)]


def test_an_epoch_of_unknown_length_has_a_number_alone(tmp_path):
    lines = shown(tmp_path, data=DataLoader(Endless()), max_steps=3)
    assert [line[0] for line in lines] == ["Epoch 0"]


def test_a_changing_accumulation_has_a_number_alone(tmp_path):
    lines = shown(tmp_path, GradientAccumulationScheduler({0: 1, 1: 2}), max_steps=7)
    assert [line[0] for line in lines] == ["Epoch 0", "Epoch 1"]


def test_max_epochs_is_shown_as_lightning_shows_it(tmp_path):
    assert shown(tmp_path, max_epochs=2) == [("Epoch 0/1", 5, 5), ("Epoch 1/1", 5, 5)]


@pytest.mark.parametrize(
    ("arguments", "bar"),
    [
        ([], EpochProgressBar),
        (["--trainer.callbacks=TQDMProgressBar"], "TQDMProgressBar"),
        (["--trainer.enable_progress_bar=false"], None),
        (["--trainer.barebones=true"], None),
    ],
)
def test_the_command_line_uses_it_unless_told_otherwise(arguments, bar):
    model = f"--model={Regression.__module__}.Regression"
    data = "--data=lightning.pytorch.demos.boring_classes.BoringDataModule"
    cli = lightning_cli([model, data, "--trainer.accelerator=cpu", *arguments], run=False)
    found = cli.trainer.progress_bar_callback
    assert found is None if bar is None else type(found) is bar or type(found).__name__ == bar
