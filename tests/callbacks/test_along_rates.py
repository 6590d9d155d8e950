"""Norms at a learning rate of their own in runs: against plain loops, resumed, on two ranks, in other trainers."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, apply_paca, write_columns
from paca_lightning.conversion.along_rates import along_parameters
from tests.artefacts import logged
from tests.callbacks.test_paca import DATA
from tests.distributed_launch import launch

LR = 1e-2
CONFIG = PaCAConfig(r=4, train_norms=True, train_biases=True, norms_lr=0.25)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8))


class Normed(L.LightningModule):
    """Another project's module: one group of all parameters that require a gradient, and a schedule."""

    def __init__(self, lr: float = LR) -> None:
        super().__init__()
        self.net, self.lr = network(), lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        world = self.trainer.world_size
        return DataLoader(DATA[self.global_rank :: world], batch_size=8 // world)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decaying)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decaying(step: int) -> float:
    return 1 - step / 40


def fit(
    directory: Path,
    *callbacks: L.Callback,
    config: PaCAConfig = CONFIG,
    module: L.LightningModule | None = None,
    ckpt_path: Path | None = None,
    resume_lr: Any = "checkpoint",
    **settings: Any,
) -> L.LightningModule:
    defaults: dict[str, Any] = {"max_epochs": 7, "logger": False, "devices": 1}  # of 3 steps each
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[PaCAStrategy(config, resume_lr=resume_lr), *callbacks],
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **(defaults | settings),
    )
    module = module or Normed()
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_equals_a_plain_loop_with_two_groups_bitwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = LearningRateMonitor("step")
    module = fit(tmp_path, monitor, logger=CSVLogger(tmp_path, name="", version=""))
    plain = Normed()
    apply_paca(plain, CONFIG)
    along = along_parameters(plain)
    assert len(along) == 4  # LayerNorm's weight and bias, and two biases of linear layers
    rest = [p for p in plain.parameters() if p.requires_grad and not any(p is other for other in along)]
    groups = [{"params": rest}, {"params": along, "lr": LR / 4, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decaying)
    for _ in range(7):
        for batch in plain_batches():
            optimizer.zero_grad()
            plain.net(batch).square().mean().backward()
            optimizer.step()
            write_columns(plain)
            schedule.step()
    assert same(state(module), state(plain))

    printed = " ".join(capsys.readouterr().out.split())
    assert "Adam's step on a column, scaling * lr: 0.01." in printed
    assert "norm weights, 1 tensors, 32 parameters, in fp32, at lr 0.0025 without weight decay." in printed
    assert "biases, 3 tensors, 72 parameters, in fp32, at lr 0.0025 without weight decay." in printed
    assert logged(tmp_path, "lr-AdamW/pg1") == pytest.approx([LR * decaying(step) for step in range(21)])
    assert logged(tmp_path, "lr-AdamW/pg2") == pytest.approx([LR / 4 * decaying(step) for step in range(21)])


def plain_batches() -> DataLoader[Tensor]:
    return DataLoader(DATA, batch_size=8)  # type: ignore[arg-type]


def test_a_run_resumes_bitwise_and_takes_other_rates_if_asked(tmp_path: Path) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="half", enable_version_counter=False)

    whole = fit(tmp_path, max_epochs=4)
    fit(tmp_path, saving(), max_epochs=2)
    assert same(state(fit(tmp_path, ckpt_path=tmp_path / "half.ckpt", max_epochs=4)), state(whole))

    # Both rates are the config's, at the position that the schedule has reached.
    other = PaCAConfig(r=4, train_norms=True, train_biases=True, norms_lr=0.5)
    module = fit(
        tmp_path,
        config=other,
        module=Normed(lr=4 * LR),
        ckpt_path=tmp_path / "half.ckpt",
        resume_lr="config",
        max_epochs=3,
    )
    rates = [group["lr"] for group in module.optimizers().optimizer.param_groups]
    assert rates == pytest.approx([4 * LR * decaying(9), 2 * LR * decaying(9)], rel=1e-12)

    with pytest.raises(PaCAError, match=r"have \[2\] parameter groups, and this run's \[1\].*norms_lr"):
        fit(tmp_path, config=PaCAConfig(r=4), ckpt_path=tmp_path / "half.ckpt", max_epochs=4)


def resumed_on_ranks(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters on each of two ranks, of a whole run and of one that was resumed."""
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    whole = fit(directory, **two)
    fit(directory, ModelCheckpoint(directory, filename="half"), max_epochs=3, **two)
    return state(whole), state(fit(directory, ckpt_path=directory / "half.ckpt", **two))


@pytest.mark.distributed
def test_two_ranks_equal_one_process_and_resume_bitwise(tmp_path: Path) -> None:
    one = state(fit(tmp_path))
    for whole, resumed in launch(resumed_on_ranks, 2, tmp_path):
        assert same(whole, resumed)
        for name, tensor in one.items():
            # Two halves of a batch are summed in another order than the whole: rounding of fp32.
            torch.testing.assert_close(whole[name], tensor, atol=1e-6, rtol=1e-5)


class TwoOptimizers(Normed):
    """Manual optimization, and the norms in an optimizer that has no column."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parts = (self.net[0], self.net[1]), (self.net[3],)
        return [
            torch.optim.SGD([p for part in some for p in part.parameters() if p.requires_grad], lr=LR)
            for some in (parts[0][:1], parts[0][1:], parts[1])
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.net(batch).square().mean()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_norms_may_be_in_an_optimizer_of_their_own(tmp_path: Path) -> None:
    module = fit(tmp_path, module=TwoOptimizers(), max_epochs=1)
    rates = [[group["lr"] for group in optimizer.optimizer.param_groups] for optimizer in module.optimizers()]
    assert rates == [[LR, LR / 4], [LR / 4], [LR, LR / 4]]


class Unscheduled(Normed):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


@pytest.mark.parametrize("first", [True, False])
def test_norms_take_their_fraction_of_a_rate_that_lightnings_finder_finds(first: bool, tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=20)
    module = Unscheduled(lr=1e-6)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[finder, PaCAStrategy(CONFIG)] if first else [PaCAStrategy(CONFIG), finder],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=2,
    )
    trainer.fit(module, DataLoader(DATA.repeat(8, 1), batch_size=8))  # type: ignore[arg-type]
    assert module.lr != 1e-6
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [module.lr, module.lr / 4]
