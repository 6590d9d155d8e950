"""Settings of DiLoCo's outer loop."""

from dataclasses import dataclass

from paca_lightning.core.errors import PaCAError


@dataclass(frozen=True)
class Outer:
    """Settings of the outer loop.

    Attributes:
        sync_every: Optimizer steps between two exchanges, H.
        lr: Of the outer SGD.
        momentum: Of the outer SGD, with Nesterov's look-ahead; 0 is plain SGD.
        fragments: Parts that are exchanged in turns, every ``sync_every / fragments`` steps (Streaming DiLoCo, arXiv
            2501.18512).
    """

    sync_every: int = 100
    lr: float = 0.7
    momentum: float = 0.9
    fragments: int = 1

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
