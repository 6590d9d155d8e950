"""A small vision transformer and random images to classify: plain PyTorch and Lightning, nothing of paca_lightning."""

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.positions = nn.Parameter(torch.randn(16, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(x).mean(dim=1))


class Classifier(LightningModule):
    def __init__(
        self,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    ) -> None:
        super().__init__()
        self.net = VisionTransformer(width, depth, heads, classes=4)
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._loss("train/loss", batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._loss("val/loss", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(p for p in self.parameters() if p.requires_grad)

    def _loss(self, name: str, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log(name, loss)
        return loss


class BrightQuadrants(LightningDataModule):
    """Noise of 16 x 16 pixels, one quadrant of which is brighter: the class."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(320, 1, 16, 16, generator=generator)
        labels = torch.arange(320) % 4
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = 8 * (label // 2), 8 * (label % 2)
            image[:, row : row + 8, column : column + 8] += 2
        self.train, self.val = TensorDataset(images[:256], labels[:256]), TensorDataset(images[256:], labels[256:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class LossNotes(Callback):
    """The project's own callback: notes the validation loss of each epoch in a file."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            with (Path(trainer.default_root_dir) / "notes.txt").open("a") as file:
                file.write(f"{trainer.callback_metrics['val/loss']:.4f}\n")
