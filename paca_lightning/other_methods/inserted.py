"""Methods whose own modules are inserted into a model by hooks: what they share in a run and in files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paca_lightning.activation_checkpointing.blocks import find_blocks
from paca_lightning.adapters.files import CONFIG, TENSORS, base_model_entries, read_json, write_json
from paca_lightning.adapters.tensors import load_tensors
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.sealed_files import check_weights
from paca_lightning.other_methods.adapted import AdaptedModel, plain


class Inserted(nn.Module, ABC):
    """A trained module whose hook edits the output of the module it is inserted into.

    The hook is a method, so that it is copied and pickled with the model. Parameters are fp32 whatever
    the base, or Lightning's precision, has.
    """

    NAME = ""
    """Attribute of the module that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    @abstractmethod
    def edit(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, D) in place of those that the module returns."""

    def insert_into(self, module: nn.Module) -> None:
        """Become a child of a module, and edit what it returns from now on."""
        module.add_module(self.NAME, self)
        module.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output with its hidden states edited: a tensor, or the first element of a tuple.

        Raises:
            PaCAError: If it is neither.
        """
        if not self.enabled:
            return output
        if isinstance(output, Tensor):
            return self.edit(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self.edit(output[0]), *output[1:])
        raise PaCAError(
            f"{type(module).__name__} returns {type(output).__name__}, neither hidden states nor a tuple that begins "
            f"with them, so {type(self).__name__} cannot edit them."
        )


class InsertedModel(AdaptedModel):
    """A model with inserted modules.

    Args:
        method: Name of the method.
        model: The model.
        settings: The method's settings.
    """

    def __init__(self, method: str, model: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(method, model, plain(settings))
        self.notes = [f"{method} cannot be merged into the weights: the adapter is applied at each forward."]

    @property
    def inserted(self) -> dict[str, Inserted]:
        """The inserted modules by path from the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, Inserted)}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside this context the model is the base model."""
        before = [(module, module.enabled) for module in self.inserted.values()]
        for module, _ in before:
            module.enabled = False
        try:
            yield
        finally:
            for module, enabled in before:
                module.enabled = enabled

    def tensors(self) -> dict[str, Tensor]:
        """The parameters of the inserted modules by name from the model."""
        named = ((f"{path}.{name}", p) for path, m in self.inserted.items() for name, p in m.named_parameters())
        return {name: parameter.detach() for name, parameter in named}

    def write(self, directory: Path) -> None:
        """Write the tensors as safetensors, and the settings as JSON."""
        save_file({name: tensor.contiguous().cpu() for name, tensor in self.tensors().items()}, directory / TENSORS)
        entries = {"method": self.method, "settings": self.settings}
        write_json(directory / CONFIG, entries | base_model_entries(self.model))

    def saved_settings(self, directory: str) -> dict[str, Any]:
        """The settings of an adapter of the method."""
        return read_settings(directory, self.method, self.settings)

    def load(self, directory: str) -> None:
        """Load an adapter of the same settings.

        Raises:
            PaCAError: If it cannot be read, was damaged, or does not fit.
        """
        check_weights(Path(directory))
        saved, own = load_tensors(Path(directory) / TENSORS), self.tensors()
        for name in sorted(saved.keys() ^ own.keys()):
            where = "has no place in the model" if name in saved else "is not in the adapter"
            raise PaCAError(f"{directory}: {name!r} {where}. Use the base model it was trained with.")
        for name, tensor in own.items():
            if saved[name].shape != tensor.shape:
                raise PaCAError(
                    f"{directory}: {name!r} has shape {tuple(saved[name].shape)}, the model needs "
                    f"{tuple(tensor.shape)}. Use the base model it was trained with."
                )
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def keep_wide(self) -> None:
        """Cast the inserted modules to fp32."""
        for module in self.inserted.values():
            module.float()


def read_settings(directory: str, method: str, known: Iterable[str]) -> dict[str, Any]:
    """The settings of an adapter.

    Args:
        directory: Of the adapter.
        method: Which it must be of.
        known: Names of the method's settings.

    Raises:
        PaCAError: If the directory is no adapter of the method.
    """
    file = Path(directory) / CONFIG
    content = read_json(file)
    settings = content.get("settings")
    if content.get("method") != method:
        other = content.get("method") or content.get("peft_type")
        raise PaCAError(f"{file} is of an adapter of {other!r}, not of {method!r}.")
    if not isinstance(settings, dict) or settings.keys() != set(known):
        raise PaCAError(f"{file} is damaged: its settings are {settings!r}, and {method} has {sorted(known)}.")
    return settings


def insert(model: nn.Module, places: dict[str, nn.Module], make: Callable[[int], Inserted]) -> None:
    """Insert a module into each of some places, and freeze all else of a model.

    Args:
        model: The model.
        places: Modules whose outputs are edited, by path from the model.
        make: Makes the module for a number of features D.
    """
    model.requires_grad_(False)
    for path, place in places.items():
        device = next((p.device for p in place.parameters()), torch.device("cpu"))
        with device:
            make(width_at(model, path)).insert_into(place)


def blocks_of(model: nn.Module, class_names: list[str] | None, method: str) -> dict[str, nn.Module]:
    """The repeated blocks of a model by path.

    Args:
        model: The model.
        class_names: Names of their classes. Default: those that a Hugging Face model declares.
        method: For messages.

    Raises:
        PaCAError: If there are none.
    """
    found = set(find_blocks(model, class_names))
    if not found:
        raise PaCAError(
            f"{method} needs the repeated blocks of a model, and {type(model).__name__} declares none. Name their "
            "class, such as block_classes: [Block]."
        )
    return {path: module for path, module in model.named_modules() if module in found}


def owner_of(model: nn.Module, path: str) -> nn.Module | None:
    """The innermost Hugging Face model around a module, told by the width in its config; None without one."""
    while True:
        owner = model.get_submodule(path)
        if getattr(getattr(owner, "config", None), "hidden_size", None) is not None:
            return owner
        if not path:
            return None
        path = path.rpartition(".")[0]


def width_at(model: nn.Module, path: str) -> int:
    """Number of features D of the hidden states at a module.

    Raises:
        PaCAError: If no config around it tells.
    """
    owner: Any = owner_of(model, path)
    if owner is not None:
        return int(owner.config.hidden_size)
    raise PaCAError(
        f"The width of {path!r} is unknown: no module around it has a config with hidden_size. Give the model a "
        "`config` with it."
    )
