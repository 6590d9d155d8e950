"""The strategy for one HPU."""

from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from paca_lightning.strategies.hpu.mixins import HPUStrategyMixin


class SingleHPUStrategy(HPUStrategyMixin, SingleDeviceStrategy):
    """Training on one HPU: ``strategy="hpu_single"``.

    Args:
        **kwargs: Arguments of Lightning's ``SingleDeviceStrategy``, except ``device``.
    """

    strategy_name = "hpu_single"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(device=torch.device("hpu", 0), **kwargs)
