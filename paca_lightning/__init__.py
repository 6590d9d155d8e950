"""Fine-tune large models with Lightning by training a few input columns of each frozen weight (PaCA)."""

import paca_lightning.strategies  # noqa: F401  (registers "paca_fsdp2" and the HPU's by name)
from paca_lightning.adapters.adapter import load_adapter, save_adapter
from paca_lightning.adapters.export import export_lora, export_merged
from paca_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from paca_lightning.callbacks.paca import PaCAStrategy
from paca_lightning.conversion.convert import apply_paca
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.conversion.revert import disable_paca, merge, unload
from paca_lightning.conversion.write_back import attach, write_columns
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import paca_layers
from paca_lightning.layers.linear import PaCALinear
from paca_lightning.layers.nf4_linear import QPaCALinear

__all__ = [
    "AdapterCheckpoint",
    "ConversionReport",
    "PaCAConfig",
    "PaCAError",
    "PaCALinear",
    "PaCAStrategy",
    "QPaCALinear",
    "apply_paca",
    "attach",
    "disable_paca",
    "export_lora",
    "export_merged",
    "load_adapter",
    "merge",
    "paca_layers",
    "save_adapter",
    "unload",
    "write_columns",
]
