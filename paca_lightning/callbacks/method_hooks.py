"""Calls that follow an object's own methods, for the length of a run."""

from collections.abc import Callable
from typing import Any


class Followers:
    """Hangs calls behind methods of some objects, and takes them off again.

    Lightning has no hook after ``configure_model`` or after the optimizers are made; instances can be given one.
    """

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def add(self, owner: Any, name: str, then: Callable[..., None]) -> None:
        """From now on call ``then`` after each call of a method, with the same arguments."""
        method = getattr(owner, name)
        self._replaced.append((owner, name, vars(owner).get(name)))

        def both(*args: Any, **kwargs: Any) -> None:
            method(*args, **kwargs)
            then(*args, **kwargs)

        setattr(owner, name, both)

    def remove(self) -> None:
        """Leave every object as it was, with a method of the instance if it had one."""
        for owner, name, before in reversed(self._replaced):
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)
        self._replaced.clear()
