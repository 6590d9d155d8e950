"""The strategy for data-parallel training on several HPUs, each with the whole model."""

from lightning.pytorch.strategies import DDPStrategy

from paca_lightning.strategies.hpu.mixins import HPUDistributedMixin


class HPUDDPStrategy(HPUDistributedMixin, DDPStrategy):
    """Distributed data parallel over HCCL, ``strategy="hpu_ddp"``; arguments as in Lightning's ``DDPStrategy``."""

    strategy_name = "hpu_ddp"
