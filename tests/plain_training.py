"""Training without PaCA's machinery: of parts of a dense model, the reference for converted ones; or made up."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning import paca_layers, write_columns


def column_masks(dense: nn.Module, converted: nn.Module) -> dict[str, Tensor]:
    """Ones at the columns that a converted model trains, by name of the weight in its dense twin."""
    masks = {}
    for path, layer in paca_layers(converted):
        weight = dense.get_parameter(f"{path}.weight")
        masks[f"{path}.weight"] = torch.zeros_like(weight).index_fill_(1, layer.paca_indices, 1)
    return masks


def train_masked(model: Any, masks: Mapping[str, Tensor], loss: Callable[[Any], Tensor], steps: int, lr: float) -> None:
    """Train a dense model, with the gradient of the masked parts alone where there is a mask."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad.mul_(mask)
        optimizer.step()


@torch.no_grad()
def move_trained(model: nn.Module, seed: int, scale: float) -> None:
    """Move everything that a converted model trains, at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    write_columns(model)
