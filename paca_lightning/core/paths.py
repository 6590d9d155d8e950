"""Names of modules: without what wrappers add, counted from the base model, and how patterns match them."""

import re
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import WRAPPER_SEGMENTS

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def clean_path(path: str) -> str:
    """A module's path without the segments that wrappers add."""
    return ".".join(segment for segment in path.split(".") if segment not in WRAPPER_SEGMENTS)


def base_model_prefix(model: nn.Module) -> str:
    """Path of the outermost Hugging Face model inside ``model``, with a dot behind it; empty if there is none.

    Column draws and adapter files count paths from there, so that a LightningModule and the bare model agree.
    """
    for path, module in model.named_modules():
        if hasattr(module, "get_output_embeddings") and hasattr(module, "config"):
            return clean_path(path) + "." if path else ""
    return ""


def relative_path(path: str, prefix: str) -> str:
    """A path counted from the base model where it lies inside."""
    return path.removeprefix(prefix)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern is a whole dotted suffix of a path, or a regular expression of all of it."""
    return path == pattern or path.endswith("." + pattern) or re.fullmatch(pattern, path) is not None


def by_path(pairs: Iterable[tuple[str, ModuleType]]) -> dict[str, ModuleType]:
    """Modules by their path.

    Raises:
        PaCAError: If two have the same one, counted from the base model, so that a file could hold one of them only.
    """
    result: dict[str, ModuleType] = {}
    for path, module in pairs:
        if path in result:
            raise PaCAError(
                f"Two layers are called {path!r}, one inside the base model and one beside it, and an adapter tells "
                "them apart by that name. Rename the outer one, or list it in exclude_modules."
            )
        result[path] = module
    return result
