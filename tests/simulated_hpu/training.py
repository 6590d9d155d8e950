"""A small model and a training run, for the tests on the simulated HPU and for their reference on the CPU."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset


class TinyModule(pl.LightningModule):
    """A small network with dropout. Each rank takes its share of a batch; ``losses`` keeps what it came to."""

    def __init__(self, *, dropout: float = 0.1, backend: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(dropout), nn.Linear(32, 4, bias=False)
        )
        self.forward_net = self.net if backend is None else torch.compile(self.net, backend=backend, fullgraph=True)
        self.losses: list[float] = []
        self.devices: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        inputs, targets = (tensor[self.global_rank :: self.trainer.world_size] for tensor in batch)
        outputs = self.forward_net(inputs)
        loss = nn.functional.cross_entropy(outputs.float(), targets)
        self.devices |= {str(inputs.device), str(loss.device), *(str(p.device) for p in self.parameters())}
        self.dtypes.add(outputs.dtype)
        self.log("loss", loss, sync_dist=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def batches(batch_size: int = 8, samples: int = 64) -> DataLoader[Any]:
    """Random inputs (N, 16) and labels (N,) of 4 classes, always the same and in the same order."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.randint(4, (samples,), generator=generator)), batch_size)


def trainer(**options: Any) -> pl.Trainer:
    """A Trainer for 6 silent steps on one device, with options to add or replace."""
    defaults = {
        "devices": 1,
        "max_steps": 6,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,  # the module shares a batch out by itself
    }
    return pl.Trainer(**(defaults | options))


def train(accelerator: str, *, module: TinyModule | None = None, **options: Any) -> TinyModule:
    """Trains a ``TinyModule`` from seed 0 and returns it, on the CPU."""
    module = module or TinyModule()
    pl.seed_everything(0, verbose=False)
    trainer(accelerator=accelerator, **options).fit(module, batches())
    return module.cpu()


def whole_weights(module: pl.LightningModule) -> Tensor:
    """All parameters in one flat tensor on the CPU, shards gathered."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().cpu().flatten() for p in whole])
