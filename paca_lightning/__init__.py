"""Fine-tune large models with Lightning by training a few input columns of each frozen weight (PaCA).

Public names are imported when they are first used (PEP 562). ``from paca_lightning import apply_paca`` therefore loads
neither Lightning nor Transformers, and costs little more than ``import torch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paca_lightning.registration import LIGHTNING, register_with_lightning

if TYPE_CHECKING:
    from paca_lightning.adapters.adapter import load_adapter, save_adapter
    from paca_lightning.adapters.export import export_lora, export_merged
    from paca_lightning.adapters.peft_paca import export_peft_paca
    from paca_lightning.adapters.weighted import merge_adapters
    from paca_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
    from paca_lightning.callbacks.adapter_history import AdapterHistory
    from paca_lightning.callbacks.bottleneck_strategy import BottleneckStrategy
    from paca_lightning.callbacks.hf_trainer import PaCATrainerCallback
    from paca_lightning.callbacks.loreft_strategy import LoReFTStrategy
    from paca_lightning.callbacks.paca import PaCAStrategy
    from paca_lightning.callbacks.peft_strategy import PEFTStrategy
    from paca_lightning.callbacks.projected_gradients import ProjectedGradients
    from paca_lightning.conversion.convert import apply_paca
    from paca_lightning.conversion.named_adapters import delete_adapter, set_adapter
    from paca_lightning.conversion.report import ConversionReport
    from paca_lightning.conversion.revert import disable_paca, merge, unload
    from paca_lightning.conversion.write_back import attach, write_columns
    from paca_lightning.core.config import PaCAConfig
    from paca_lightning.core.errors import PaCAError
    from paca_lightning.layers.base import paca_layers
    from paca_lightning.layers.linear import PaCALinear
    from paca_lightning.layers.nf4_linear import QPaCALinear
    from paca_lightning.tasks.classification_data import ClassificationDataModule
    from paca_lightning.tasks.classifier import ClassifierModule
    from paca_lightning.tasks.embedding import EmbeddingModule
    from paca_lightning.tasks.embedding_data import EmbeddingDataModule
    from paca_lightning.tasks.new_tokens import add_new_tokens

__all__ = [
    "AdapterCheckpoint",
    "AdapterHistory",
    "BottleneckStrategy",
    "ClassificationDataModule",
    "ClassifierModule",
    "ConversionReport",
    "EmbeddingDataModule",
    "EmbeddingModule",
    "LoReFTStrategy",
    "PEFTStrategy",
    "PaCAConfig",
    "PaCAError",
    "PaCALinear",
    "PaCAStrategy",
    "PaCATrainerCallback",
    "ProjectedGradients",
    "QPaCALinear",
    "add_new_tokens",
    "apply_paca",
    "attach",
    "delete_adapter",
    "disable_paca",
    "export_lora",
    "export_merged",
    "export_peft_paca",
    "load_adapter",
    "merge",
    "merge_adapters",
    "paca_layers",
    "save_adapter",
    "set_adapter",
    "unload",
    "write_columns",
]

_MODULES = {  # the same as above, for Python: tests/test_imports.py compares the two
    "AdapterCheckpoint": "callbacks.adapter_checkpoint",
    "AdapterHistory": "callbacks.adapter_history",
    "BottleneckStrategy": "callbacks.bottleneck_strategy",
    "ClassificationDataModule": "tasks.classification_data",
    "ClassifierModule": "tasks.classifier",
    "ConversionReport": "conversion.report",
    "EmbeddingDataModule": "tasks.embedding_data",
    "EmbeddingModule": "tasks.embedding",
    "LoReFTStrategy": "callbacks.loreft_strategy",
    "PEFTStrategy": "callbacks.peft_strategy",
    "PaCAConfig": "core.config",
    "PaCAError": "core.errors",
    "PaCALinear": "layers.linear",
    "PaCAStrategy": "callbacks.paca",
    "PaCATrainerCallback": "callbacks.hf_trainer",
    "ProjectedGradients": "callbacks.projected_gradients",
    "QPaCALinear": "layers.nf4_linear",
    "add_new_tokens": "tasks.new_tokens",
    "apply_paca": "conversion.convert",
    "attach": "conversion.write_back",
    "delete_adapter": "conversion.named_adapters",
    "disable_paca": "conversion.revert",
    "export_lora": "adapters.export",
    "export_merged": "adapters.export",
    "export_peft_paca": "adapters.peft_paca",
    "load_adapter": "adapters.adapter",
    "merge": "conversion.revert",
    "merge_adapters": "adapters.weighted",
    "paca_layers": "layers.base",
    "save_adapter": "adapters.adapter",
    "set_adapter": "conversion.named_adapters",
    "unload": "conversion.revert",
    "write_columns": "conversion.write_back",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES[name]
    if module.startswith(("callbacks.", "tasks.")):
        import_module(LIGHTNING)  # before ours, so that threads take the import locks in one order
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_lightning()
