"""Lightning strategies, registered by name when this package is imported."""

from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.strategies.hpu import HPUAccelerator, HPUDDPStrategy, HPUFSDP2Strategy, SingleHPUStrategy

__all__ = ["FSDP2Strategy", "HPUAccelerator", "HPUDDPStrategy", "HPUFSDP2Strategy", "SingleHPUStrategy"]
