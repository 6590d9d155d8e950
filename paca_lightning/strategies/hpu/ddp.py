"""The strategy for data-parallel training on several HPUs, each of which holds the whole model."""

from lightning.pytorch.strategies import DDPStrategy

from paca_lightning.strategies.hpu.mixins import HPUDistributedMixin


class HPUDDPStrategy(HPUDistributedMixin, DDPStrategy):
    """Distributed data parallelism over HCCL: ``strategy="hpu_ddp"``. Takes the arguments of ``DDPStrategy``."""

    strategy_name = "hpu_ddp"
