"""Keeps fp32 buffers in fp32 when a module is cast."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class KeepsWideBuffers(nn.Module):
    """A module whose fp32 buffers stay in fp32 when it is moved or cast, as ``from_pretrained(dtype=...)`` keeps them.

    Rotary frequencies are such buffers. Rounded to bf16, they shift the angles of late positions by a radian.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if name in wide and buffer.dtype != torch.float32:
                owner, _, key = name.rpartition(".")
                setattr(self.get_submodule(owner), key, wide[name].to(buffer.device))
        return self
