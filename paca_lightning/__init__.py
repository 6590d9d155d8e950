"""Fine-tune large models with Lightning by training a few input columns of each frozen weight (PaCA)."""

import paca_lightning.strategies  # noqa: F401  (registers "paca_fsdp2" and the HPU's by name)
from paca_lightning.adapter import load_adapter, save_adapter
from paca_lightning.adapter_checkpoint import AdapterCheckpoint
from paca_lightning.callback import PaCAStrategy
from paca_lightning.config import PaCAConfig
from paca_lightning.conversion import apply_paca
from paca_lightning.errors import PaCAError
from paca_lightning.layers import PaCALinear
from paca_lightning.quantized import QPaCALinear
from paca_lightning.report import ConversionReport
from paca_lightning.reversal import disable_paca, merge, unload
from paca_lightning.targets import paca_layers
from paca_lightning.tools.export import export_lora, export_merged
from paca_lightning.write_back import attach, write_columns

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
