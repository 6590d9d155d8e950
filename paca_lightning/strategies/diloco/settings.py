"""Settings of DiLoCo's outer loop."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from paca_lightning.core.errors import PaCAError

Compression = Literal["none", "bf16", "int8", "top_k"]
"""What replicas send: their change as it is, or smaller."""


@dataclass(frozen=True)
class Outer:
    """Settings of the outer loop.

    Attributes:
        sync_every: Optimizer steps between two exchanges, H.
        lr: Of the outer SGD.
        momentum: Of the outer SGD, with Nesterov's look-ahead; 0 is plain SGD.
        fragments: Parts that are exchanged in turns, every ``sync_every / fragments`` steps (Streaming DiLoCo, arXiv
            2501.18512).
        compression: How the change is made smaller before it is sent; int8 and top_k send later what they leave out.
        top_k: Share of the values that top_k sends.
    """

    sync_every: int = 100
    lr: float = 0.7
    momentum: float = 0.9
    fragments: int = 1
    compression: Compression = "none"
    top_k: float = 0.01

    def __post_init__(self) -> None:
        if self.sync_every < 1 or self.fragments < 1 or self.sync_every % self.fragments:
            raise PaCAError(
                f"sync_every={self.sync_every} and fragments={self.fragments}: both are at least 1, and fragments "
                "divides sync_every."
            )
        if self.lr <= 0 or not 0 <= self.momentum < 1:
            raise PaCAError(
                f"outer_lr={self.lr} has to be positive, and outer_momentum={self.momentum} from 0 to below 1."
            )
        if self.compression not in get_args(Compression):
            raise PaCAError(f"compression={self.compression!r} is none of {', '.join(get_args(Compression))}.")
        if not 0 < self.top_k <= 1:
            raise PaCAError(f"top_k={self.top_k} has to be a share of the values, above 0 and up to 1.")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        """The outer optimizer of parameters."""
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)


def from_environment(value: int | None, name: str, variable: str) -> int:
    """A setting, or else a variable of the environment.

    Raises:
        PaCAError: If there is neither, or the variable is no number.
    """
    if value is not None:
        return value
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise PaCAError(f"set the strategy's {name}, or {variable} (now {text!r}), to a whole number.")
    return int(text)
