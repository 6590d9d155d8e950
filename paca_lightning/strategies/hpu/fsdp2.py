"""The strategy that shards a model over several HPUs."""

from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.strategies.hpu.mixins import HPUFSDP2Mixin


class HPUFSDP2Strategy(HPUFSDP2Mixin, FSDP2Strategy):
    """FSDP2 over HCCL: ``strategy="hpu_fsdp2"``. Takes the arguments of ``FSDP2Strategy``."""

    strategy_name = "hpu_fsdp2"
