"""The strategy for training on several HPUs over which the model is sharded."""

from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.strategies.hpu.mixins import HPUFSDP2Mixin


class HPUFSDP2Strategy(HPUFSDP2Mixin, FSDP2Strategy):
    """FSDP2 over HCCL, ``strategy="hpu_fsdp2"``; arguments as in ``FSDP2Strategy``."""

    strategy_name = "hpu_fsdp2"
