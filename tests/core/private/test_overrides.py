"""Canaries for private methods that our classes override, and private attributes that they share with a base class."""

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import paca_lightning
import paca_lightning.core.private as private
from paca_lightning.core.private import OVERRIDES, Override
from tests.core.private.canary import explained
from tests.private_apis import PRIVATE, USED_IN, class_names, is_self

LIBRARIES = {
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "bitsandbytes",
    "torchmetrics",
    "jsonargparse",
    "torchft",
}


KERNEL = "paca_lightning.layers.column_kernel"
"""It has functions only, and cannot be imported without Triton."""


def private_names(owner: type) -> set[str]:
    """Private methods and attributes that other libraries' classes in an MRO define, in the body or on ``self``."""
    bases = [base for base in owner.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
    names = {name for base in bases for name in defined_names(base)}
    return {name for name in names if PRIVATE.fullmatch(name) and not name.startswith("_abc_")}


@functools.cache
def defined_names(owner: type) -> set[str]:
    """All names that one class defines, in the body or on ``self``."""
    names = {*vars(owner), *vars(owner).get("__annotations__", {})}
    compiled = owner.__module__.startswith("torch._C") or owner is torch.distributed.ProcessGroup
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)) if not compiled else "")
    return names | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value)
    }


def imported(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("override", "owner"),
    [(override, owner) for override in OVERRIDES for owner in override.owners],
    ids=lambda value: value.name if isinstance(value, Override) else value.rpartition(".")[2],
)
def test_what_is_overridden_exists(override: Override, owner: str) -> None:
    try:
        assert override.name in private_names(imported(owner)), f"{owner} has no {override.name}"
    except (AssertionError, ImportError, AttributeError) as error:
        library = owner.split(".")[0]
        users = ", ".join(override.used_in)
        raise AssertionError(explained(f"{library}, OVERRIDES, used in {users}", error)) from error


def our_classes() -> Iterator[type]:
    """The classes in the package's source; libraries put others into its modules while it runs."""
    for info in pkgutil.walk_packages(paca_lightning.__path__, "paca_lightning."):
        if info.name == KERNEL:
            continue
        module = importlib.import_module(info.name)
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                yield getattr(module, node.name)


@pytest.mark.slow
def test_no_class_shares_a_private_name_with_its_bases_unlisted() -> None:
    for ours in our_classes():
        module = ours.__module__.removeprefix("paca_lightning.")
        tree = ast.parse(textwrap.dedent(inspect.getsource(ours)))
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
        used |= {name for node in tree.body if isinstance(node, ast.ClassDef) for name in class_names(node)}
        shared = used & private_names(ours)
        assert shared <= {name for name in shared if module in USED_IN.get(name, ())}, f"{ours}: {sorted(shared)}"


def test_every_listed_override_is_used() -> None:
    used: dict[str, str] = {}
    for override in OVERRIDES:
        for module in override.used_in:
            source = inspect.getsource(importlib.import_module(f"paca_lightning.{module}"))
            used[f"{module}: {override.name}"] = source
    assert [place for place, source in used.items() if place.rpartition(" ")[2] not in source] == []


def test_one_method_moves_and_casts() -> None:
    calls: list[str] = []

    class Counts(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            calls.append("apply")
            return super()._apply(fn, recurse)

    model = nn.Sequential(Counts(1, 1))
    for number, move in enumerate((model.half, model.double, lambda: model.to("meta"))):
        move()
        assert len(calls) == number + 1
    model.to_empty(device="cpu")
    assert len(calls) == 4


def test_every_library_has_a_file_of_canaries() -> None:
    for module in pkgutil.iter_modules(private.__path__):
        importlib.import_module(f"tests.core.private.test_{module.name}")
