"""Hooks on methods: called after them, gone after the run, and no part of a copy."""

import copy
import pickle

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from paca_lightning.callbacks.method_hooks import MethodHooks, replaced_methods


class Counter(pl.LightningModule):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def add(self, number: int) -> int:
        self.count += number
        return self.count


def test_the_call_follows_and_the_result_passes_through() -> None:
    counter, calls, hooks = Counter(), [], MethodHooks()
    hooks.add(counter, "add", lambda number: calls.append((number, counter.count)))
    hooks.add(counter, "add", lambda number: calls.append("second"))
    assert counter.add(2) == 2
    assert calls == [(2, 2), "second"]
    hooks.remove()
    assert "add" not in vars(counter)
    assert counter.add(1) == 3
    assert len(calls) == 2


def test_a_method_of_the_instance_comes_back() -> None:
    counter, hooks = Counter(), MethodHooks()
    own = counter.add = lambda number: -number  # type: ignore[method-assign]
    hooks.add(counter, "add", lambda number: None)
    assert counter.add(3) == -3
    hooks.remove()
    assert counter.add is own


def test_copies_and_pickles_do_without_the_call_and_keep_to_themselves() -> None:
    counter, calls, hooks = Counter(), [], MethodHooks()
    hooks.add(counter, "add", calls.append)
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert other.add(5) == 5
        assert other.count == 5
    assert counter.count == 0
    assert calls == []
    counter.add(1)
    assert calls == [1]


def test_lightning_sees_a_hooked_method_as_overridden() -> None:
    counter, hooks = Counter(), MethodHooks()
    assert not is_overridden("configure_model", counter)
    hooks.add(counter, "configure_model", lambda: None)
    assert is_overridden("configure_model", counter)


def test_methods_are_replaced_for_a_while() -> None:
    counter = Counter()
    with replaced_methods(counter, add=lambda number: 7):
        assert counter.add(1) == 7
    assert counter.add(1) == 1
    assert "add" not in vars(counter)
