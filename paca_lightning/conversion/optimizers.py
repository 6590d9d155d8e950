"""Optimizers as they come: wrapped in others, moving parameters outside or within a step, scaled by the parameter."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from paca_lightning.core.dtensor import is_first_rank
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import step_hooks, version_of

MOVING_METHODS = ("first_step", "second_step", "train", "eval")
"""Methods that move parameters outside ``step``: those of SAM, and those with which schedule-free optimizers swap."""

FOLLOWERS = "_paca_followers"
"""Attribute of an optimizer: what runs after its moving methods, by key."""


def optimizers_within(optimizer: Any) -> list[torch.optim.Optimizer]:
    """An optimizer and those it wraps as ``optimizer``, the innermost first; without those that run no step hooks.

    Lightning's and Fabric's wrappers show the hooks of the optimizer inside, which counts once. Wrappers such as
    Lookahead have hooks of their own, and move parameters after the inner step.

    Raises:
        PaCAError: If none runs step hooks.
    """
    chain = [optimizer]
    while isinstance(inner := getattr(chain[-1], "optimizer", None), torch.optim.Optimizer):
        chain.append(inner)
    found: list[torch.optim.Optimizer] = []
    for candidate in reversed(chain):
        hooks = step_hooks(candidate)
        if hooks is not None and all(hooks is not step_hooks(other) for other in found):
            found.append(candidate)
    if not found:
        raise PaCAError(
            f"{type(optimizer).__name__} takes no step hooks, so the trained columns could not be written back. Pass "
            "the torch.optim.Optimizer that it wraps, or call write_columns(model) after each step yourself."
        )
    return found


def follow_moves(optimizer: torch.optim.Optimizer, write: Callable[[], None]) -> RemovableHandle:
    """Call a function after each method of an optimizer that moves parameters outside ``step``.

    Like PyTorch's own step hooks, this wraps the methods of the class, once. Wrappers that inherit from it are covered,
    whenever they were made: Lightning's and Fabric's.

    Args:
        optimizer: Any. One without such methods is left alone.
        write: Is called after each of them.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    for name in MOVING_METHODS:
        owner = next((cls for cls in type(optimizer).__mro__ if name in vars(cls)), None)
        if owner is not None and not hasattr(vars(owner)[name], FOLLOWERS):
            setattr(owner, name, _followed(vars(owner)[name]))
    followers = vars(optimizer).setdefault(FOLLOWERS, _Followers())
    handle = RemovableHandle(followers)
    followers[handle.id] = write
    return handle


class _Followers(dict[int, Callable[[], None]]):
    """A dictionary to which a handle can have a weak reference."""


def _followed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def moving(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        for write in list(getattr(self, FOLLOWERS, {}).values()):
            write()
        return result

    setattr(moving, FOLLOWERS, True)
    return moving


class ClosureFollower:
    """A step pre-hook: before each evaluation of a step's closure, writes what the step has moved so far.

    LBFGS, and SAM with a closure, evaluate the loss several times within a step.

    Args:
        parameters: Returns what to watch, such as the deltas.
        write: Is called if a version counter of a parameter has moved since the last evaluation.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]], write: Callable[[], None]) -> None:
        self._parameters, self._write = parameters, write

    def __call__(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the closure; ``args`` begins with the optimizer."""
        if callable(closure := kwargs.get("closure")):
            return args, {**kwargs, "closure": self._following(closure)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._following(args[1]), *args[2:]), kwargs
        return None

    def _following(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        versions = self._versions()

        @functools.wraps(closure)
        def following(*args: Any, **kwargs: Any) -> Any:
            nonlocal versions
            if (now := self._versions()) != versions:
                versions = now
                self._write()
            return closure(*args, **kwargs)

        return following

    def _versions(self) -> list[int]:
        return [version_of(parameter) for parameter in self._parameters()]


def warn_of_small_steps(optimizer: torch.optim.Optimizer, deltas: set[int]) -> None:
    """Warn of Adafactor where it scales its steps by the size of a parameter: a delta begins at zero and stays small.

    Args:
        optimizer: Any.
        deltas: The ``id`` of each delta.
    """
    if not any("Adafactor" in cls.__name__ for cls in type(optimizer).__mro__) or not is_first_rank():
        return
    for group in optimizer.param_groups:
        least = group["eps"][1] if isinstance(group.get("eps"), tuple | list) else 1.0
        if group.get("scale_parameter", True) and least < 1 and deltas & {id(p) for p in group["params"]}:
            warnings.warn(
                f"{type(optimizer).__name__} scales its steps by the size of a parameter, and deltas begin at zero: "
                f"they move by only {least:g} times the learning rate a step. To train deltas at the learning rate, "
                f"build it with eps=({group['eps'][0]}, 1.0), or Hugging Face's with scale_parameter=False.",
                stacklevel=3,
            )
            return
