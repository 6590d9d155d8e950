"""Canaries: tests that exercise one function of core/private on the real library, and explain their failure."""

import ast
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from paca_lightning.core.private.torch import TorchDispatchMode

COVERED: set[str] = set()


def explained(names: str, error: BaseException) -> str:
    """What a failed canary says: library and version, the function that relied on it, and what to do."""
    library = names.split(".")[0]
    return (
        f"{library} {importlib.metadata.version(library)} no longer does what paca_lightning/core/private ({names}) "
        f"relies on: {type(error).__name__}: {error}. Read the docstring there, look the API up in the new release, "
        "adapt the function (or call a public API that has come) and run `pytest tests/core/private` again. Until "
        f"then, exclude this version of {library} in pyproject.toml."
    )


def canary(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test as the canary of some functions of core/private (``torch.storage_id``), and explain its failure."""
    COVERED.update(names)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                raise AssertionError(explained(", ".join(names), error)) from error

        return wrapped

    return decorate


def check_coverage(library: str) -> None:
    """Assert that every name in the module for a library has a canary, and that no canary outlived its function."""
    defined: set[str] = set()
    for node in ast.parse(inspect.getsource(importlib.import_module(f"paca_lightning.core.private.{library}"))).body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            defined.update(alias.name for alias in node.names if alias.asname)
    assert defined
    assert {f"{library}.{name}" for name in defined} == {name for name in COVERED if name.startswith(f"{library}.")}


class Recorder(TorchDispatchMode):
    """Records the operators that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(operator.name() == name for operator in self.operators)
