"""timm beside a torch without CUDA: its models do not need torchvision, whose wheel needs CUDA."""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn


class _AnyAttribute(type):
    """A class whose attributes are their own names: ``InterpolationMode.BICUBIC``."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    """A module of torchvision as far as timm's imports see it: every name is a class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _AnyAttribute(name, (nn.Module,), {})


STAND_INS = [
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
]


def import_timm() -> Any:
    """timm, imported with stand-ins for torchvision where that is missing; skips the test where timm is."""
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name == "timm":
            pytest.skip("timm is not installed")
    for name in STAND_INS:
        sys.modules[name] = _StandIn(name)
    for name in STAND_INS[1:]:
        parent, _, own = name.rpartition(".")
        setattr(sys.modules[parent], own, sys.modules[name])
    try:
        return importlib.import_module("timm")
    finally:
        for name in STAND_INS:
            del sys.modules[name]
