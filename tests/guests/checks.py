"""What holds for a trained guest."""

import torch
from torch import nn

from paca_lightning import paca_layers


def is_written(model: nn.Module) -> bool:
    """Whether every weight equals its base columns plus its scaled delta."""
    for _, layer in paca_layers(model):
        before = layer.weight.clone()
        layer.write_columns()
        if not torch.equal(layer.weight, before):
            return False
    return True


def same_state(first: nn.Module, second: nn.Module) -> bool:
    """Whether what two models train is bitwise the same, and was moved."""
    state, other = (
        {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} for model in (first, second)
    )
    moved = all(layer.paca_delta.any() for _, layer in paca_layers(first))
    return moved and state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
