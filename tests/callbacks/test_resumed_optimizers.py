"""What a run says of its learning rate: when it resumes with other settings, and when nothing has moved."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from paca_lightning import AdapterCheckpoint, PaCAError, PaCAStrategy, apply_paca, attach, paca_layers
from tests.callbacks.test_paca import CONFIG, Module, loader
from tests.distributed_launch import launch


class Configured(Module):
    """With an optimizer of choice."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> None:
        super().__init__()
        self.optimizer, self.settings = optimizer, settings
        self.schedule: Any = None

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad], **self.settings)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def fit(
    module: L.LightningModule,
    directory: Path,
    *callbacks: Any,
    ckpt_path: Path | None = None,
    resume_lr: Any = "checkpoint",
    **more: Any,
) -> None:
    defaults: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[PaCAStrategy(CONFIG, resume_lr=resume_lr), *callbacks],
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | more),
    )
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    fit(Configured(lr=1e-2), tmp_path, ModelCheckpoint(tmp_path, filename="one"))
    return tmp_path / "one.ckpt"


def test_a_resumed_run_shows_the_learning_rate_that_it_uses_and_names_the_ignored_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    ignored = r"Ignored.*: lr=0\.5 \(goes on with 0\.01\), weight_decay=0\.3 \(goes on with 0\.01\)\."
    for sanity_steps in (0, 1):
        with pytest.warns(UserWarning, match=ignored):
            fit(
                Configured(lr=0.5, weight_decay=0.3),
                tmp_path,
                ckpt_path=checkpoint,
                max_epochs=2,
                num_sanity_val_steps=sanity_steps,
            )
        assert "Adam's step on a column, scaling * lr: 0.02." in capsys.readouterr().out


def test_a_run_that_resumes_with_the_same_settings_says_nothing(
    checkpoint: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fit(Configured(lr=1e-2), tmp_path, ckpt_path=checkpoint, max_epochs=2)
    fit(Configured(lr=0.5), tmp_path)
    assert not any("Ignored" in str(warning.message) for warning in recwarn)


def test_a_schedule_does_not_look_like_another_learning_rate(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def halving(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    for ckpt_path, epochs in ((None, 1), (tmp_path / "one.ckpt", 2)):
        module = Configured(lr=1e-2)
        module.schedule = halving
        fit(module, tmp_path, ModelCheckpoint(tmp_path, filename="one"), ckpt_path=ckpt_path, max_epochs=epochs)
    assert not any("Ignored" in str(warning.message) for warning in recwarn)


def halved_at_each_step(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def warm_then_decaying(optimizer: torch.optim.Optimizer) -> Any:
    """A schedule of schedules, which changes over in the resumed part."""
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=4)
    decaying = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    whole = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decaying], [8])
    return torch.optim.lr_scheduler.ChainedScheduler([whole, torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)])


class Rates(L.Callback):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        self.noted: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.noted.append(trainer.optimizers[0].param_groups[0]["lr"])


OLD, NEW = 2**-7, 2**-5  # powers of two: a schedule's rates scale by them without rounding


def changed_by_hand(schedule: Any, batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
    """Deltas and rates of two epochs of a plain loop, whose schedule is scaled by another rate in the second."""
    module, rates = Configured(), []
    apply_paca(module, CONFIG)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1.0)
    handle = attach(optimizer, module)
    shape = None if schedule is None else schedule(optimizer)
    (group,) = optimizer.param_groups
    for rate in (OLD, NEW):
        for batch in batches:
            factor = group["lr"]
            group["lr"] = factor * rate
            rates.append(group["lr"])
            module.net(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            group["lr"] = factor
            if shape is not None:
                shape.step()
    handle.remove()
    return deltas_of(module), rates


def deltas_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.paca_delta.detach().clone() for _, layer in paca_layers(module)]


def resumed_with_another_rate(
    directory: Path, schedule: Any, settings: dict[str, Any]
) -> tuple[list[torch.Tensor], list[float]]:
    """Deltas and rates of a second epoch, begun from the checkpoint of a first one with another learning rate."""
    rates = Rates()
    for lr, epochs, more in ((OLD, 1, {}), (NEW, 2, {"ckpt_path": directory / "one.ckpt"})):
        module = Configured(lr=lr)
        module.schedule = schedule
        rates.noted.clear()
        saving = ModelCheckpoint(directory, filename="one", enable_version_counter=False)
        fit(module, directory, rates, saving, resume_lr="config", max_epochs=epochs, **(more | settings))
    return deltas_of(module), rates.noted


@pytest.mark.parametrize("schedule", [None, halved_at_each_step, warm_then_decaying])
def test_a_resumed_run_takes_the_learning_rate_of_its_config(
    schedule: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    resumed, rates = resumed_with_another_rate(tmp_path, schedule, {})
    batches = list(loader())
    expected, expected_rates = changed_by_hand(schedule, batches)
    assert rates == expected_rates[len(batches) :]
    assert all(torch.equal(one, other) for one, other in zip(resumed, expected, strict=True))
    assert f"resume_lr='config': the run goes on with lr={NEW}; its checkpoint has {OLD}." in caplog.text
    assert not any("Ignored" in str(warning.message) for warning in recwarn)


@pytest.mark.distributed
def test_two_ranks_take_the_same_learning_rate(tmp_path: Path) -> None:
    two = {"devices": 2, "strategy": "ddp"}
    (first, rates), (second, others) = launch(resumed_with_another_rate, 2, tmp_path, halved_at_each_step, two)
    assert rates == others == [NEW / 2**step for step in range(len(rates), 2 * len(rates))]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        (partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20), "the learning rates of OneCycleLR"),
        (partial(torch.optim.lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.2), "the learning rates of CyclicLR"),
        (
            partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=20, eta_min=1e-3),
            r"the learning rates of CosineAnnealingLR\(eta_min=0\.001\), which lie above a fixed one",
        ),
    ],
)
def test_a_rate_that_is_not_defined_is_refused(schedule: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=complaint + ".*Leave resume_lr at 'checkpoint', or begin a new run"):
        resumed_with_another_rate(tmp_path, schedule, {})


def test_a_rate_from_zero_is_refused(tmp_path: Path) -> None:
    class TwoGroups(Configured):
        def configure_optimizers(self) -> Any:
            first, *others = (p for p in self.parameters() if p.requires_grad)
            return torch.optim.AdamW([{"params": [first], "lr": self.settings["first"]}, {"params": others}], lr=OLD)

    fit(TwoGroups(first=0.0), tmp_path, ModelCheckpoint(tmp_path, filename="one"))
    with pytest.raises(PaCAError, match=r"resume_lr='config' cannot go from learning rate 0\.0 to 0\.03125"):
        fit(TwoGroups(first=NEW), tmp_path, ckpt_path=tmp_path / "one.ckpt", max_epochs=2, resume_lr="config")


def test_resume_lr_is_checked() -> None:
    with pytest.raises(PaCAError, match=r"resume_lr='yes' is unknown\. Choose checkpoint or config"):
        PaCAStrategy(CONFIG, resume_lr="yes")  # type: ignore[arg-type]


def test_another_optimizer_is_refused_before_its_state_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match="was saved by a run with AdamW, and this one has SGD, which cannot go on"):
        fit(Configured(torch.optim.SGD, lr=1e-2), tmp_path, ckpt_path=checkpoint, max_epochs=2)


def test_a_run_whose_deltas_did_not_move_fails_and_leaves_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"No delta has moved in this run of 6 .*The learning rate is 0\.0"):
        fit(Configured(lr=0.0), tmp_path, AdapterCheckpoint(str(tmp_path / "adapter")))
    assert not list(tmp_path.glob("adapter*"))


def test_a_run_of_one_step_in_its_warm_up_moves_the_deltas(tmp_path: Path) -> None:
    from paca_lightning.tasks import LinearSchedule

    module = Configured(lr=1e-2)
    module.schedule = lambda optimizer: LinearSchedule(optimizer, warmup_steps=10, total_steps=100)
    fit(module, tmp_path, max_steps=1)
    assert module.net[0].paca_delta.any()


def test_a_run_without_steps_need_not_move_anything(checkpoint: Path, tmp_path: Path) -> None:
    fit(Configured(lr=1e-2), tmp_path, AdapterCheckpoint(), ckpt_path=checkpoint, limit_train_batches=0)
    fit(Configured(lr=1e-2), tmp_path, ckpt_path=checkpoint)  # its epoch is over


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("val/los"),
        EarlyStopping("val_loss"),
        EarlyStopping("eval/loss"),
        ModelCheckpoint(monitor="val/los"),
        AdapterCheckpoint(monitor="val/accuracy"),
    ],
)
def test_a_mistyped_metric_is_told_after_the_sanity_check(callback: Any, tmp_path: Path) -> None:
    name = type(callback).__name__
    with pytest.raises(PaCAError, match=rf"{name}\(monitor='.*'\): validation logs no such metric. It logs 'val/loss'"):
        fit(Configured(lr=1e-2), tmp_path, callback, num_sanity_val_steps=1, max_steps=1)


def test_a_metric_that_training_may_log_is_left_to_the_run(tmp_path: Path) -> None:
    fit(Configured(lr=1e-2), tmp_path, EarlyStopping("train/loss"), num_sanity_val_steps=1)
    lenient = [EarlyStopping("val/los", strict=False), ModelCheckpoint(tmp_path, monitor="step", mode="max")]
    fit(Configured(lr=1e-2), tmp_path, *lenient, num_sanity_val_steps=1)

    class Accuracy(Configured):
        def on_train_batch_end(self, *_: Any) -> None:
            self.log("accuracy", 1.0)

    with pytest.warns(UserWarning, match=r"EarlyStopping\(monitor='accuracy'\): .* Unless training logs it"):
        fit(Accuracy(lr=1e-2), tmp_path, EarlyStopping("accuracy"), num_sanity_val_steps=1)


def test_a_validation_interval_longer_than_an_epoch_is_told_before_the_sanity_check(tmp_path: Path) -> None:
    class Unreached(L.Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            raise AssertionError("the sanity check began")

    with pytest.raises(PaCAError, match=r"`val_check_interval` \(500\) must be less than or equal"):
        fit(Configured(lr=1e-2), tmp_path, Unreached(), num_sanity_val_steps=1, val_check_interval=500)
