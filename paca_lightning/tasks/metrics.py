"""Mean loss over tokens, independent of how they are spread over batches and processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class MeanTokenLoss(Metric):
    """Summed loss of all tokens since the last reset, divided by their number, over all processes.

    Unlike ``torchmetrics.MeanMetric``, an update does not wait for the device. The sum is fp32 or wider under every
    precision, as a bf16 sum stops growing at 256 times the summand.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, tokens: Tensor) -> None:
        """Add a summed loss and its number of tokens, both scalars."""
        self.total += total.detach()
        self.tokens += tokens

    def compute(self) -> Tensor:
        """The mean, fp32; NaN if there was no token."""
        return self.total / self.tokens

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move the state, but neither narrow it (``bf16-true``) nor leave it uninitialized (``to_empty``)."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            dtype = torch.promote_types(tensor.dtype, moved.dtype)
            return torch.zeros_like(moved, dtype=dtype) if tensor.is_meta else tensor.to(moved.device, dtype)

        return super()._apply(keep, exclude_state)
