"""Trains a tiny Llama in the same way on one process and sharded over several."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, disable_paca, paca_layers, write_columns
from paca_lightning.core.dtensor import local
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from tests.moe import tiny_moe
from tests.tiny import tiny_llama

TOKENS = 16


class TinyChat(LightningModule):
    """A tiny Llama whose rows do not divide by the ranks. It is built in __init__ or configure_model."""

    def __init__(
        self,
        *,
        in_init: bool = False,
        dtype: torch.dtype = torch.float32,
        by_step: bool = False,
        directory: Path | None = None,
        experts: str | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.overrides = {"intermediate_size": 97, "vocab_size": 383} | overrides
        self.dtype_ = dtype
        self.by_step = by_step  # a step's data depends on its number alone: Lightning replays a plain DataLoader
        self.directory = directory
        self.experts = experts  # the kind of a mixture of experts
        self.losses: list[float] = []
        self.ranks_of_one = 1
        self.model: nn.Module | None = self._build() if in_init else None

    def _build(self) -> nn.Module:
        if self.directory and getattr(self.trainer.strategy, "streams_checkpoints", False):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.directory)).train()
            model.checkpoint_directory = self.directory
            return model
        if self.directory:
            return AutoModelForCausalLM.from_pretrained(self.directory).train()
        if self.experts:
            return tiny_moe(self.experts, vocab_size=383)
        return tiny_llama(**self.overrides).to(self.dtype_)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._build()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.model is not None
        if self.by_step:
            first = 4 * self.trainer.global_step + self.trainer.global_rank
            batch = _data()[first : 4 * self.trainer.global_step + 4 : self.trainer.world_size]
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        # Equally long samples: the mean over ranks is the loss of one process's larger batch.
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.losses.append(float(mean))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert self.model is not None
        self.log("loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)

    def train_dataloader(self) -> DataLoader[Tensor]:
        data = _data()
        if self.ranks_of_one > 1:  # this one process's micro-batches are the batches of so many ranks
            data = data.view(-1, 4 // self.ranks_of_one, self.ranks_of_one, TOKENS).transpose(1, 2).flatten(0, 2)
            return DataLoader(data, batch_size=4 // self.ranks_of_one, shuffle=False)  # type: ignore[arg-type]
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(data, batch_size=4 // ranks, sampler=sampler)  # type: ignore[arg-type]


def _data() -> Tensor:
    return torch.randint(0, 383, (160, TOKENS), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Run:
    """What to train, and how."""

    steps: int = 10
    config: PaCAConfig = PaCAConfig(r=4, alpha=8)  # noqa: RUF009  (frozen)
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] | None = None
    ranks_of_one: int = 1
    resume: Path | None = None
    save: Path | None = None


def train(run: Run) -> dict[str, Any]:
    """Train, sharded if the run has a strategy. Returns losses and whole deltas."""
    module = TinyChat(**run.module)
    module.ranks_of_one = run.ranks_of_one
    trainer = make_trainer(run)
    trainer.fit(module, ckpt_path=run.resume)
    losses = [sum(part) / run.ranks_of_one for part in zip(*[iter(module.losses)] * run.ranks_of_one, strict=True)]
    return {"losses": losses, "deltas": whole_deltas(module)}


def make_trainer(run: Run, **overrides: Any) -> Trainer:
    callbacks: list[Callback] = [PaCAStrategy(run.config)]
    if run.save:  # at the ends of epochs, where a run resumes exactly with any DataLoader
        callbacks.append(ModelCheckpoint(run.save.parent, run.save.stem, every_n_train_steps=5))
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1 if run.strategy is None else int(os.environ["LOCAL_WORLD_SIZE"]),
        "strategy": "auto" if run.strategy is None else FSDP2Strategy(**run.strategy),
        "max_steps": run.steps,
        "accumulate_grad_batches": run.ranks_of_one,
        "callbacks": callbacks,
        "logger": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": run.save is not None,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(settings | run.trainer | overrides))


def resume_all(runs: dict[str, Run], refused: dict[str, Run]) -> dict[str, Any]:
    """Results of runs that resume, and error messages of runs that must not resume."""
    messages = {}
    for name, run in refused.items():
        with pytest.raises(PaCAError) as error:
            train(run)
        messages[name] = str(error.value)
    return train_all(runs) | {"refused": messages}


def whole_deltas(module: nn.Module) -> dict[str, Tensor]:
    """The delta of each layer, gathered. Also checks that each layer's weight contains it."""
    deltas = {}
    for path, layer in paca_layers(module):
        delta = layer.paca_delta.detach()
        deltas[path] = (delta.full_tensor() if hasattr(delta, "full_tensor") else delta).clone()
        if layer.base_name == "weight":
            rows = local(layer.weight)
            columns = (layer.rows(rows) if isinstance(layer, PaCAExperts) else rows)[..., layer.paca_indices]
            expected = local(layer.paca_base_columns) + layer.scaling * local(layer.paca_delta)
            assert torch.equal(columns, expected.to(columns.dtype))
    return deltas


def train_all(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """Train several runs in one launch."""
    return {name: train(run) for name, run in runs.items()}


class Plain(LightningModule):
    """A module without blocks, whose step calls ``self(x)`` and then uses a parameter of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))
            self.gain = nn.Parameter(torch.full((1,), 2.0))
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self(batch) * self.gain - 1).square().mean()
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        with disable_paca(self):
            without = self(batch)
        self.log("changed", (self(batch) - without).abs().max(), sync_dist=True)

    configure_optimizers = TinyChat.configure_optimizers

    def train_dataloader(self) -> DataLoader[Tensor]:
        data = torch.randn(160, 12, generator=torch.Generator().manual_seed(0))
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(data, batch_size=4 // ranks, sampler=sampler)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def train_plain(run: Run) -> dict[str, Any]:
    """Train the plain module, with validations that use the base model, then validate once more."""
    module = Plain()
    settings = {"limit_train_batches": 4, "limit_val_batches": 1, "enable_progress_bar": False}
    make_trainer(run, **settings).fit(module)
    changed = make_trainer(run, **settings).validate(module, verbose=False)[0]["changed"]
    return {"losses": module.losses, "deltas": whole_deltas(module), "changed": changed}


class CountCommunication(Callback):
    """Counts collectives in each micro-batch, and in a write-back."""

    def __init__(self) -> None:
        self.reductions: list[int] = []
        self.in_write_back: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.mode = CommDebugMode()
        self.mode.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.mode.__exit__(None, None, None)
        counts = {str(operator): count for operator, count in self.mode.get_comm_counts().items()}
        self.reductions.append(sum(int(count) for operator, count in counts.items() if "reduce_scatter" in operator))
        with CommDebugMode() as mode:
            write_columns(pl_module)
        self.in_write_back = int(mode.get_total_counts())


def count_communication() -> dict[str, Any]:
    """Count collectives in four micro-batches, two per step."""
    counter = CountCommunication()
    run = Run(steps=2, strategy={}, trainer={"accumulate_grad_batches": 2})
    make_trainer(run, callbacks=[PaCAStrategy(run.config), counter]).fit(TinyChat())
    return {"reductions": counter.reductions, "in write-back": counter.in_write_back}


def train_until_death(run: Run, dies_at: int) -> None:
    """Save after each step. The last rank dies at a given step."""

    class Die(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert run.save
            trainer.save_checkpoint(run.save)
            if trainer.global_step == dies_at and trainer.global_rank == trainer.world_size - 1:
                os._exit(9)

    make_trainer(run, callbacks=[PaCAStrategy(run.config), Die()]).fit(TinyChat())


def on_two_ranks(runs: dict[str, Run], plain: Run) -> dict[str, Any]:
    """All runs on two ranks that are compared with one process, in one launch."""
    return {
        "runs": train_all(runs),
        "plain": train_plain(plain),
        "communication": count_communication(),
        "again": validate_after_fit(),
        "full disk": save_on_a_full_disk(),
    }


def validate_after_fit() -> tuple[int, int]:
    """Numbers of steps of two fits of one module, with a validation in between, each with a new Trainer."""
    module, run = TinyChat(), Run(strategy={}, steps=2)
    make_trainer(run).fit(module)
    make_trainer(run, limit_val_batches=1).validate(module, module.train_dataloader(), verbose=False)
    trainer = make_trainer(run)
    trainer.fit(module)
    return len(module.losses), trainer.global_step


def save_on_a_full_disk() -> str:
    """The error message of saving when the last rank's disk has one byte left."""
    trainer = make_trainer(Run(steps=1, strategy={}))
    trainer.fit(TinyChat())
    free = 1 if trainer.global_rank == trainer.world_size - 1 else 2**40
    with patch("shutil.disk_usage", lambda _: SimpleNamespace(free=free)), pytest.raises(PaCAError) as refused:
        trainer.save_checkpoint("/tmp/never-written.ckpt")
    return str(refused.value)


def assert_equal_runs(sharded: dict[str, Any], one: dict[str, Any]) -> None:
    """Losses and deltas agree up to a few fp32 ulps: ranks sum in another order, and HPUs have other kernels."""
    assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert sharded["deltas"].keys() == one["deltas"].keys()
    for path, delta in one["deltas"].items():
        assert delta.any()
        torch.testing.assert_close(sharded["deltas"][path], delta, rtol=0, atol=1e-5)
