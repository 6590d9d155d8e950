"""Whole tensors out of shards, and which rank writes them."""

import torch
from torch import Tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor in host memory, gathered if it is sharded (then call it on every rank)."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def is_first_rank() -> bool:
    """Whether this process writes files: the first of several, or the only one."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
