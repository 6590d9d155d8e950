"""Canaries for the private APIs of Lightning."""

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import Tensor, nn

from paca_lightning.core.private import lightning as private
from paca_lightning.core.private.torch import init_fake_process_group
from paca_lightning.strategies.hpu.connector import patch_connector
from paca_lightning.tools.lost_ranks import GRACE
from tests.core.private.canary import canary, check_coverage


def trainer(directory: Path, **settings: Any) -> Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_val_batches": 0, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=directory, **(defaults | quiet | settings))


class Watcher(Callback):
    """Asks for what a trainer knows at each batch."""

    def __init__(self) -> None:
        self.logging: list[bool] = []
        self.steps: list[int] = []
        self.accumulating: list[bool] = []
        self.validation_due: list[bool] = []
        self.attached: Trainer | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.logging.append(private.should_log(trainer))
        self.steps.append(private.logged_step(trainer))
        self.attached = private.trainer_of(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.accumulating.append(private.is_accumulating(trainer))
        self.validation_due.append(private.validation_is_due(trainer))


@canary("lightning.remember_saved_step")
def test_remember_saved_step(tmp_path: Path) -> None:
    class Saved(Callback):
        def on_train_start(self, *_: Any) -> None:
            private.remember_saved_step(saving, 1)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, callbacks=[Saved(), saving], limit_train_batches=3, enable_checkpointing=True).fit(BoringModel())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt"]


@canary("lightning.leave_out_sigterm_broadcast")
@pytest.mark.parametrize("left_out", [False, True])
def test_leave_out_sigterm_broadcast(left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LeavesOut(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            if left_out:
                private.leave_out_sigterm_broadcast(trainer)

    asked: list[int] = []
    init_fake_process_group(2)
    try:
        monkeypatch.setattr(Trainer, "world_size", 2)
        monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: asked.append(1))
        trainer(tmp_path, callbacks=[LeavesOut()], limit_train_batches=3).fit(BoringModel())
    finally:
        torch.distributed.destroy_process_group()
    assert len(asked) == (0 if left_out else 3)


@canary("lightning.validation_is_due")
def test_validation_is_due(tmp_path: Path) -> None:
    watcher = Watcher()
    settings: dict[str, Any] = {"limit_train_batches": 5, "limit_val_batches": 1, "val_check_interval": 2}
    trainer(tmp_path, callbacks=[watcher], **settings).fit(BoringModel())
    assert watcher.validation_due == [False, True, False, True, False]


@canary("lightning.should_log", "lightning.logged_step", "lightning.is_accumulating", "lightning.trainer_of")
def test_where_a_trainer_stands(tmp_path: Path) -> None:
    watcher, model = Watcher(), BoringModel()
    assert private.trainer_of(model) is None
    run = trainer(tmp_path, callbacks=[watcher], limit_train_batches=5, accumulate_grad_batches=2, log_every_n_steps=2)
    run.fit(model)
    assert watcher.attached is run
    assert watcher.logging == [False, False, True, True, False]
    assert watcher.steps == [0, 0, 1, 1, 2]
    assert watcher.accumulating == [True, False, True, False, False]  # the last batch of an epoch steps


@canary("lightning.before_batch_transfer")
@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`")
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_before_batch_transfer(owner: str, tmp_path: Path) -> None:
    model: Any = BoringModel()
    data: LightningDataModule = BoringDataModule()
    seen: list[Tensor] = []

    class Asks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(private.before_batch_transfer(pl_module, torch.zeros(1)))

    holder = model if owner == "module" else data
    holder.__class__ = type("Adds", (type(holder),), {"on_before_batch_transfer": lambda self, batch, index: batch + 1})
    trainer(tmp_path, callbacks=[Asks()], limit_train_batches=1).fit(model, datamodule=data if holder is data else None)
    assert [tensor.item() for tensor in seen] == [1]


class StatefulLoader:
    """A loader with a state that restores what waits when it is iterated."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.loaded: list[dict[str, Any]] = []
        self.loaded_at_first_batch: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(4):
            if number == 0 and self.trainer is not None:
                private.restore_loader_states(self.trainer)
                self.loaded_at_first_batch = list(self.loaded)
            yield torch.ones(2, 32)

    def state_dict(self) -> dict[str, Any]:
        return {"position": 2}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded.append(state_dict)


class AsksForItsLength(BoringModel):
    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches > 0  # makes the loaders before the checkpoint is read
        return torch.optim.SGD(self.parameters(), lr=0.1)


@canary("lightning.restore_loader_states")
def test_restore_loader_states(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=2, max_epochs=-1)
    first.fit(AsksForItsLength(), train_dataloaders=StatefulLoader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    loader, second = StatefulLoader(), trainer(tmp_path, max_steps=4, max_epochs=-1)
    loader.trainer = second
    second.fit(AsksForItsLength(), train_dataloaders=loader, ckpt_path=str(tmp_path / "half.ckpt"))
    assert loader.loaded_at_first_batch == [{"position": 2}]


@canary("lightning.spawns_workers")
@pytest.mark.parametrize(("strategy", "spawns"), [("ddp_spawn", True), ("ddp_fork", True), ("ddp", False)])
def test_spawns_workers(strategy: str, spawns: bool, tmp_path: Path) -> None:
    assert private.spawns_workers(trainer(tmp_path, strategy=strategy, devices=2)) == spawns
    assert not private.spawns_workers(trainer(tmp_path))


@canary("lightning.averaged_model")
def test_averaged_model(tmp_path: Path) -> None:
    averaging = WeightAveraging()
    assert private.averaged_model(averaging) is None
    trainer(tmp_path, callbacks=[averaging], limit_train_batches=1).fit(BoringModel())
    averaged = private.averaged_model(averaging)
    assert averaged is not None
    assert {tuple(parameter.shape) for parameter in averaged.parameters()} == {(2, 32), (2,)}


@canary("lightning.pruned_modules")
def test_pruned_modules(tmp_path: Path) -> None:
    model, run = BoringModel(), trainer(tmp_path)
    pruning = ModelPruning("l1_unstructured")
    pruning.setup(run, model, "fit")
    assert private.pruned_modules(pruning) == [model.layer]  # once, for its weight and its bias


@canary("lightning.set_device")
def test_set_device() -> None:
    model = BoringModel()
    private.set_device(nn.ModuleList([model]), torch.device("meta"))
    assert model.device.type == "meta"
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@canary("lightning.optimizers_to_device")
def test_optimizers_to_device() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    private.optimizers_to_device([optimizer], torch.device("meta"))
    for state in optimizer.state.values():
        assert {name: value.device.type for name, value in state.items()} == {
            "step": "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }


@canary("lightning.accelerator_connector")
def test_accelerator_connector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connector = private.accelerator_connector()
    patch_connector(type("Copy", (), dict(vars(connector))))  # checks what it relies on
    made: list[Any] = []
    initialise = connector.__init__

    def watched(self: Any, **settings: Any) -> None:
        made.append(self)
        initialise(self, **settings)

    monkeypatch.setattr(
        connector, "__init__", lambda self, **settings: (made.append(self), initialise(self, **settings))[1]
    )
    trainer(tmp_path)
    assert len(made) == 1


def test_every_function_has_a_canary() -> None:
    check_coverage("lightning")


@canary("lightning.requeue_signal")
def test_the_signal_that_requeues_a_slurm_job(tmp_path: Path) -> None:
    assert private.requeue_signal(trainer(tmp_path)) is None
    for requeues in (True, False):
        environment = SLURMEnvironment(auto_requeue=requeues, requeue_signal=signal.SIGHUP)
        run = trainer(tmp_path, plugins=[environment])
        assert private.requeue_signal(run) == (signal.SIGHUP if requeues else None)


@canary("lightning.next_version", "lightning.has_fixed_version")
@pytest.mark.parametrize("logger_class", [CSVLogger, TensorBoardLogger])
def test_versions_of_loggers(logger_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", True)
    logger = logger_class(tmp_path, name="run")
    assert not private.has_fixed_version(logger)
    for version in range(3):
        assert private.next_version(logger) == version
        (tmp_path / "run" / f"version_{version}").mkdir(parents=True)
    assert private.has_fixed_version(logger_class(tmp_path, name="run", version="mine"))


@canary("lightning.wait_before_ending_ranks")
def test_wait_before_ending_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    private.wait_before_ending_ranks(GRACE)  # as every run of the command line does, so once for the whole process
    rank, first = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    waited: list[tuple[float, int | None]] = []
    rank.kill()
    rank.wait()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda seconds: waited.append((seconds, first.poll())))
            _ChildProcessObserver(main_pid=first.pid, child_processes=[rank]).run()
        assert first.wait(60) == -signal.SIGKILL
    finally:
        first.kill()
    assert waited == [(5, None), (GRACE, None)]
