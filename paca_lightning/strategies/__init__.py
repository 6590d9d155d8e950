"""Lightning strategies, registered by name when this package is imported."""

from paca_lightning.strategies.hpu import HPUAccelerator, HPUDDPStrategy, SingleHPUStrategy

__all__ = ["HPUAccelerator", "HPUDDPStrategy", "SingleHPUStrategy"]
