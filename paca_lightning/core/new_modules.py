"""Modules of a model that start at random, such as a new head: whoever builds a model declares them on it."""

from collections.abc import Iterable

from torch import nn

NEW_MODULES = "new_modules"
"""Attribute of a Hugging Face model: paths in it of the modules that were not pretrained and must be trained whole."""


def declare_new(model: nn.Module, paths: Iterable[str]) -> None:
    """Declare modules of a model as new: conversions train them whole, unless ``exclude_modules`` names them."""
    vars(model)[NEW_MODULES] = list(paths)


def declared_new(model: nn.Module) -> list[str]:
    """Paths of the modules of a model that were declared as new."""
    return list(vars(model).get(NEW_MODULES, ()))
