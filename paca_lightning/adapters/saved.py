"""An adapter as it was saved: what loading it needs, wherever it was read from."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from paca_lightning.adapters.files import CONFIG, AdapterSettings, adapter_config, read_json, read_settings
from paca_lightning.adapters.tensors import AdapterTensors, read_tensors
from paca_lightning.core.config import PaCAConfig


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it was saved, checked by itself. Names count from the base model.

    Attributes:
        config: The settings of its conversion.
        settings: What PEFT's layout has no place for; None if PEFT wrote the adapter.
        tensors: Indices, deltas and what else was trained.
        base_model: Directory or hub id of the base model, if it is known.
        verified: Whether the bytes are known to be those that were saved.
    """

    config: PaCAConfig
    settings: AdapterSettings | None
    tensors: AdapterTensors
    base_model: str | None
    verified: bool

    @property
    def left(self) -> list[str]:
        """Paths of layers that were frozen by hand."""
        return [] if self.settings is None else self.settings.left


def read_adapter(source: str | os.PathLike[str]) -> SavedAdapter:
    """Read an adapter directory.

    Raises:
        PaCAError: If a file is missing or damaged, or a tensor cannot be part of an adapter.
    """
    directory = Path(source)
    config, settings = adapter_config(directory), read_settings(directory)
    checksums = None if settings is None else settings.checksums
    base_model = read_json(directory / CONFIG).get("base_model_name_or_path")
    return SavedAdapter(config, settings, read_tensors(directory, checksums), base_model, checksums is not None)


def saved_config(source: str | os.PathLike[str]) -> PaCAConfig:
    """The settings of an adapter's conversion, without its tensors.

    Raises:
        PaCAError: As :func:`read_adapter`.
    """
    return adapter_config(source)


def adapter_layers(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The columns that an adapter trains, by layer path, and the layers that its training left frozen by hand.

    Raises:
        PaCAError: As :func:`read_adapter`.
    """
    adapter = read_adapter(source)
    return adapter.tensors.indices, adapter.left
