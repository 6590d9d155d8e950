"""AdaptedModel: what callbacks need of a model that a method beside PaCA trains, whichever it is."""

import json
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from paca_lightning.adapters.tensors import implausible
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.core.dtensor import is_first_rank
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import written_aside
from paca_lightning.core.sealed_files import seal_weights
from paca_lightning.other_methods.same_base import BaseSamples, check_adapter_base, write_samples

ADAPTED = "_paca_adapted_model"
"""Attribute of a module that holds its AdaptedModel; it is copied and pickled with the module."""


class AdaptedModel(ABC):
    """A model with the trained parts of a method in it.

    Args:
        method: Name of the method, such as ``LoRA``.
        model: The model that was adapted: the module of a run, or the Hugging Face model in it.
        settings: The method's settings, as JSON can hold them.

    Attributes:
        frozen: Names of the parameters that a checkpoint of the module leaves out.
        adapter: Directory of the adapter that was loaded.
        base: Some values of the frozen weights, as ``same_base`` compares them.
        notes: What a user must know before training, one sentence each.
    """

    def __init__(self, method: str, model: nn.Module, settings: dict[str, Any]) -> None:
        self.method = method
        self.model = model
        self.settings = settings
        self.frozen: set[str] = set()
        self.adapter: str | None = None
        self.base: BaseSamples = {}
        self.notes: list[str] = []

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Inside this context the model is the base model."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What an adapter holds, by the names in its file."""

    @abstractmethod
    def write(self, directory: Path) -> None:
        """Write the adapter's files."""

    @abstractmethod
    def saved_settings(self, directory: str) -> dict[str, Any]:
        """The settings of an adapter of the method.

        Raises:
            PaCAError: If it is none, or damaged.
        """

    @abstractmethod
    def load(self, directory: str) -> None:
        """Load an adapter that was trained with the same settings.

        Raises:
            PaCAError: If it does not fit.
        """

    def check_origin(self, directory: str) -> None:
        """Refuse an adapter of another method, other settings or another base model.

        Raises:
            PaCAError: Naming what differs.
        """
        check_adapter_base(self.base, Path(directory))
        check_settings(self, self.saved_settings(directory), directory)

    def start_from(self, directory: str) -> None:
        """Load an adapter that was trained with the same settings on the same base model.

        Raises:
            PaCAError: If it does not fit.
        """
        self.check_origin(directory)
        self.load(directory)
        self.adapter = directory

    def keep_wide(self) -> None:  # noqa: B027  (methods whose parameters have the dtype of the base need nothing)
        """Widen parameters that must not be trained in half precision, after the module was cast."""

    def save(self, directory: Path) -> None:
        """Write an adapter directory: aside, then renamed. The first rank writes.

        Raises:
            PaCAError: If training diverged, or the directory cannot be written.
        """
        if not is_first_rank():
            return
        if (problem := implausible(self.tensors())) is not None:
            raise PaCAError(f"{problem}: training diverged, so there is no adapter to save. Lower the learning rate.")
        with written_aside(directory) as scratch:
            self.write(scratch)
            write_samples(self.base, scratch)
            seal_weights(scratch)


def adapted_model(module: nn.Module) -> AdaptedModel | None:
    """The AdaptedModel of a run's module; None if no method beside PaCA has adapted it."""
    return vars(module).get(ADAPTED)


def find_model(module: nn.Module, path: str | None) -> tuple[str, nn.Module]:
    """The path and the model in a run's module that is to be adapted.

    Args:
        module: Of a run, with its model built.
        path: Of the model. Default: the first Hugging Face model, or without one the module itself.

    Raises:
        PaCAError: If there is no such module, or it has no weights yet.
    """
    if path is None:
        path, model = next(iter(take_inventory(module).base_models.items()), ("", module))
    else:
        try:
            model = module.get_submodule(path)
        except AttributeError as error:
            children = [name for name, _ in module.named_children()]
            raise PaCAError(f"path={path!r} names no module: {error}. The outermost modules are {children}.") from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PaCAError("A model on the meta device cannot be adapted. Build it with its weights.")
    return path, model


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's trained parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them: a checkpoint is read with ``weights_only=True``, which knows no classes."""
    result: dict[str, Any] = json.loads(json.dumps(settings, default=_plain_value))
    return result


def _plain_value(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset | tuple) else str(value)


def check_settings(adapted: AdaptedModel, saved: dict[str, Any], where: str) -> None:
    """Refuse what was trained with other settings.

    Args:
        adapted: The model of this run.
        saved: The settings it was trained with.
        where: What holds it, to begin the message.

    Raises:
        PaCAError: Naming the settings that differ.
    """
    here = adapted.settings
    different = [name for name in sorted(here.keys() | saved.keys()) if here.get(name) != saved.get(name)]
    if different:
        said = ", ".join(f"{name}={saved.get(name)!r} (here {here.get(name)!r})" for name in different)
        raise PaCAError(f"{where} was trained with {said}. Use the settings it was trained with.")
