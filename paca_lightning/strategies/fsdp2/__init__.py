"""FSDP2 for any LightningModule: ``strategy="paca_fsdp2"``."""

from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy

__all__ = ["FSDP2Strategy"]
