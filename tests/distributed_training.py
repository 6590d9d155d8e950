"""Training of a tiny Llama, the same on one process and sharded over several."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from paca_lightning import PaCAConfig, PaCAStrategy, paca_layers
from paca_lightning.layers import local
from paca_lightning.strategies.fsdp2 import FSDP2Strategy
from tests.tiny import tiny_llama

SAMPLES, TOKENS = 160, 16


class TinyChat(LightningModule):
    """A tiny Llama with odd sizes, so that rows do not divide by the ranks, built in __init__ or configure_model."""

    def __init__(self, *, in_init: bool = False, dtype: torch.dtype = torch.float32, **overrides: Any) -> None:
        super().__init__()
        self.overrides = {"intermediate_size": 97, "vocab_size": 383} | overrides
        self.dtype_ = dtype
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.model: nn.Module | None = self._build() if in_init else None

    def _build(self) -> nn.Module:
        return tiny_llama(**self.overrides).to(self.dtype_)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self._build()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.model is not None
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        # Equally long samples: the mean over ranks is the loss of one process's larger batch.
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.losses.append(float(mean))
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        generator = torch.Generator().manual_seed(0)
        data = torch.randint(0, 383, (SAMPLES, TOKENS), generator=generator)
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, ranks, rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(data, batch_size=4 // ranks, sampler=sampler)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """What to train, and how."""

    steps: int = 10
    config: PaCAConfig = PaCAConfig(r=4, alpha=8)
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] | None = None
    resume: Path | None = None
    save: Path | None = None


def train(run: Run) -> dict[str, Any]:
    """Train and return losses and whole deltas; sharded if the run has a strategy."""
    module = TinyChat(**run.module)
    trainer = make_trainer(run)
    trainer.fit(module, ckpt_path=run.resume)
    if run.save:
        trainer.save_checkpoint(run.save)
    return {"losses": module.losses, "deltas": whole_deltas(module)}


def make_trainer(run: Run, **overrides: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1 if run.strategy is None else int(os.environ["WORLD_SIZE"]),
        "strategy": "auto" if run.strategy is None else FSDP2Strategy(**run.strategy),
        "max_steps": run.steps,
        "callbacks": [PaCAStrategy(run.config)],
        "logger": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(settings | run.trainer | overrides))


def whole_deltas(module: nn.Module) -> dict[str, Tensor]:
    """The delta of each layer, gathered; and a check that each layer's weight is in step with it."""
    deltas = {}
    for path, layer in paca_layers(module):
        delta = layer.paca_delta.detach()
        deltas[path] = (delta.full_tensor() if hasattr(delta, "full_tensor") else delta).clone()
        if layer.base_name == "weight":
            columns = local(layer.weight)[:, layer.paca_indices]
            expected = local(layer.paca_base_columns) + layer.scaling * local(layer.paca_delta)
            assert torch.equal(columns, expected.to(columns.dtype))
    return deltas


def train_all(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """Several runs in one launch."""
    return {name: train(run) for name, run in runs.items()}
