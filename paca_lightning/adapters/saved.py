"""An adapter as it was saved: what loading it needs, read from an adapter directory or from a checkpoint."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from paca_lightning.adapters.checkpoint import read_checkpoint, read_note
from paca_lightning.adapters.files import CONFIG, TENSORS, read_files
from paca_lightning.adapters.foreign import foreign_config
from paca_lightning.adapters.head import HEADS_BY_TASK, Head
from paca_lightning.adapters.settings import AdapterSettings
from paca_lightning.adapters.tensors import AdapterTensors, read_foreign, read_tensors, tensor_names
from paca_lightning.core.checkpoints import SUFFIX, is_checkpoint_directory
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import NewTokens


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it was saved, checked by itself. Names count from the base model.

    Attributes:
        config: The settings of its conversion.
        settings: What PEFT's layout has no place for; None if another program wrote the adapter.
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

    @property
    def head(self) -> Head | None:
        """The head over labels of the model that it was trained on, if it had one and that is known."""
        return None if self.settings is None else self.settings.head

    @property
    def new_tokens(self) -> NewTokens | None:
        """New tokens that it needs in its base model."""
        return None if self.settings is None else self.settings.new_tokens


def read_adapter(source: str | os.PathLike[str]) -> SavedAdapter:
    """Read an adapter directory, or the adapter in a Lightning checkpoint.

    Raises:
        PaCAError: If a file is missing or damaged, a tensor cannot be part of an adapter, or a checkpoint does not tell
            how its adapter was made.
    """
    path = Path(source)
    if is_checkpoint(path):
        note, tensors = read_checkpoint(path)
        return SavedAdapter(note.settings.config, note.settings, tensors, note.base_model, verified=True)
    peft, settings = read_files(path)
    base_model = peft.get("base_model_name_or_path")
    if settings is None:
        config, tensors = read_foreign(path, peft)
        return SavedAdapter(config, None, tensors, base_model, verified=False)
    tensors = read_tensors(path, settings.checksums)
    return SavedAdapter(settings.config, settings, tensors, base_model, settings.checksums is not None)


def saved_config(source: str | os.PathLike[str]) -> PaCAConfig:
    """The settings of an adapter's conversion, without its tensors.

    Raises:
        PaCAError: As :func:`read_adapter`.
    """
    path = Path(source)
    if is_checkpoint(path):
        return read_note(path).settings.config
    peft, settings = read_files(path)
    return foreign_config(peft, tensor_names(path / TENSORS), path) if settings is None else settings.config


def saved_settings(source: str | os.PathLike[str]) -> AdapterSettings | None:
    """What an adapter tells beside its tensors; None if another program wrote it.

    Raises:
        PaCAError: As :func:`read_adapter`.
    """
    path = Path(source)
    return read_note(path).settings if is_checkpoint(path) else read_files(path)[1]


def saved_needs(source: str | os.PathLike[str]) -> tuple[Head | None, NewTokens | None]:
    """What the model of an adapter had beside its base: a head over labels, and new tokens.

    Raises:
        PaCAError: As :func:`read_adapter`, or if another program wrote the adapter of a head, without its labels.
    """
    path = Path(source)
    if is_checkpoint(path):
        note = read_note(path)
        return note.settings.head, note.settings.new_tokens
    peft, settings = read_files(path)
    if settings is not None:
        return settings.head, settings.new_tokens
    if peft.get("task_type") in HEADS_BY_TASK:
        raise PaCAError(
            f"{path}: another program wrote this adapter of a head ({peft['task_type']}), without its labels. "
            "Build the model with transformers, and use load_adapter(model, directory)."
        )
    return None, None


def is_checkpoint(path: Path) -> bool:
    """Whether a path means a checkpoint, there or not, and no adapter directory.

    Raises:
        PaCAError: If it is a directory of another kind.
    """
    if not path.is_dir():
        return path.is_file() or path.suffix == SUFFIX
    if not (path / CONFIG).exists() and not is_checkpoint_directory(path):
        inside = ", ".join(sorted(file.name for file in path.glob(f"*{SUFFIX}"))[:5])
        raise PaCAError(
            f"{path / CONFIG} is missing: {str(path)!r} is not a complete adapter directory, and no sharded checkpoint."
            + (f" There are checkpoints in it; name one: {inside}." if inside else "")
        )
    return not (path / CONFIG).exists()


def adapter_layers(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The columns that an adapter trains, by layer path, and the layers that its training left frozen by hand.

    Raises:
        PaCAError: As :func:`read_adapter`.
    """
    adapter = read_adapter(source)
    return adapter.tensors.indices, adapter.left
