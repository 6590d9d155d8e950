"""Calls behind methods of Lightning's objects, for the length of a run.

Lightning has no hook after ``configure_model``, after the optimizers are built or before a checkpoint is loaded into
the module. All methods of Lightning that this package wraps or replaces are wrapped or replaced here.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class MethodHooks:
    """Calls around methods of some objects until ``remove``.

    An object can be copied and pickled meanwhile: its copy does without the calls.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def add(
        self, owner: Any, name: str, then: Callable[..., None], *, first: Callable[..., None] | None = None
    ) -> None:
        """From now on call ``then`` after each call of a method, and ``first`` before, with the same arguments."""
        method = getattr(owner, name)
        self._replaced.append((owner, name, vars(owner).get(name)))
        # A partial: it is copied and pickled with its owner, and Lightning looks through it for overridden methods.
        setattr(owner, name, functools.partial(_call_all, _Call(first), method, _Call(then)))

    def remove(self) -> None:
        """Leave every object as it was, with a method of the instance if it had one."""
        for owner, name, before in reversed(self._replaced):
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)
        self._replaced.clear()


class _Call:
    """A call that belongs to one run: a copy of it does nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.function is not None:
            self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Call":
        return _Call()

    def __reduce__(self) -> tuple[type["_Call"], tuple[()]]:
        return _Call, ()


def _call_all(first: _Call, method: Callable[..., Any], then: _Call, *args: Any, **kwargs: Any) -> Any:
    first(*args, **kwargs)
    result = method(*args, **kwargs)
    then(*args, **kwargs)
    return result


@contextmanager
def replaced_methods(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Inside this context an object has other methods."""
    before = {name: vars(owner).get(name) for name in methods}
    for name, method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            delattr(owner, name)
            if method is not None:
                setattr(owner, name, method)
