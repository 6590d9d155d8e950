"""Memory of a training step, allocation by allocation. It works on tensors without data.

A :class:`MemoryTracer` sees every operator that PyTorch dispatches: which storages it allocates, and when the last
reference to each is gone. It does not see what a kernel allocates and frees by itself, nor gaps of the allocator.
docs/decisions/0013 compares it with torch's own tracker.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from typing_extensions import override

from paca_lightning.core.dtensor import local
from paca_lightning.core.private.torch import (
    GATHERING_OPERATORS,
    TorchDispatchMode,
    active_fake_mode,
    awaits_collective,
    storage_id,
    tensors_in,
)
from paca_lightning.tools.memory.timeline import Kind, Timeline


@dataclass
class _Allocation:
    size: int
    start: int
    phase: str
    may_be_saved: bool  # whether it was allocated while autograd recorded
    kind: Kind | None = None
    end: int | None = None


class MemoryTracer(TorchDispatchMode):
    """Records when storages are allocated and freed.

    Phases are entered with :meth:`enter`. Their names begin with ``forward``, ``backward`` or ``optimizer``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._phase = "forward"
        self._counts = True
        self._phases: list[str] = []
        self._allocations: list[_Allocation] = []
        self._live: dict[int, _Allocation] = {}
        self._references: dict[int, weakref.ref[UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count tensors that were allocated before as in use, and say for what."""
        for tensor in tensors:
            self._follow(local(tensor.detach()).untyped_storage()).kind = kind

    def enter(self, phase: str) -> None:
        """Begin a phase of the step."""
        self._phase = phase

    @property
    def phase(self) -> str:
        """The phase that was entered last."""
        return self._phase

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is allocated inside counts nothing: it is not in the device's memory."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def end_forward(self) -> None:
        """The forward is over: what it allocated and is still in use is saved for the backward."""
        self._settle("forward", Kind.ACTIVATIONS)

    def end_backward(self, *, elsewhere: bool = False) -> None:
        """The backward is over: what it allocated and is still in use is gradients.

        Args:
            elsewhere: Whether they leave the device's memory now.
        """
        for allocation in self._settle("backward", Kind.GRADIENTS):
            allocation.size *= not elsewhere

    def in_use(self, kind: Kind) -> int:
        """Bytes of a kind that are in use now."""
        return sum(allocation.size for allocation in self._live.values() if allocation.kind is kind)

    def timeline(self, trainable_parameters: int) -> Timeline:
        """What was recorded so far.

        Args:
            trainable_parameters: How many parameters are trained.
        """
        count = len(self._phases)
        changes = np.zeros((count + 1, len(Kind)), dtype=np.int64)
        for allocation in self._allocations:
            kind = allocation.kind
            if kind is None:
                recomputed = allocation.phase.startswith("backward") and allocation.may_be_saved
                kind = Kind.ACTIVATIONS if recomputed else Kind.TEMPORARY
            changes[min(allocation.start, count), kind] += allocation.size
            if allocation.end is not None:
                changes[min(allocation.end, count), kind] -= allocation.size
        sizes = changes.cumsum(0)[:count]
        # Operators that change nothing, such as views, are left out. Some run in the first step alone, because PyTorch
        # caches constants, and equal steps must give equal timelines.
        kept = [
            number
            for number in range(count)
            if not number
            or self._phases[number] != self._phases[number - 1]
            or (sizes[number] != sizes[number - 1]).any()
        ]
        return Timeline([self._phases[number] for number in kept], sizes[kept], trainable_parameters)

    @override
    def __enter__(self) -> "MemoryTracer":
        self._fake_mode = active_fake_mode()
        self._resize = UntypedStorage.resize_
        tracer, resize = self, self._resize

        def resize_(storage: UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            tracer._resized(storage)
            return result

        # FSDP2 frees and allocates gathered parameters with it, and it is no operator.
        UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    @override
    def __exit__(self, *args: Any) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*args)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then calls operators on the local tensors, which come here
        # Really, waiting returns its argument; on tensors without data, PyTorch makes a new one.
        result = args[0] if awaits_collective(func) else func(*args, **(kwargs or {}))
        if active_fake_mode() is not self._fake_mode:
            return result  # DTensor computes shapes under a fake mode of its own
        for tensor in tensors_in(result):
            if tensor.device.type != "meta":
                self._follow(tensor.untyped_storage())
        if func.name() in GATHERING_OPERATORS:
            self._gathers(args, kwargs or {})
        self._phases.append(self._phase)
        return result

    def _follow(self, storage: UntypedStorage) -> _Allocation:
        """The allocation of a storage, recorded now if it is new, and followed to its end."""
        key = storage_id(storage)
        if key not in self._live:
            self._begin(key, storage.nbytes() if self._counts else 0)
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        return self._live[key]

    def _begin(self, key: int, size: int, kind: Kind | None = None) -> None:
        allocation = _Allocation(size, len(self._phases), self._phase, torch.is_grad_enabled(), kind)
        self._live[key] = allocation
        self._allocations.append(allocation)

    def _end(self, key: int) -> None:
        allocation = self._live.pop(key, None)
        if allocation is not None:
            allocation.end = len(self._phases)

    def _forget(self, key: int) -> None:
        """A storage was deleted."""
        self._end(key)
        self._references.pop(key, None)

    def _resized(self, storage: UntypedStorage) -> None:
        """A storage was freed or allocated in place: its allocation ends, and another begins."""
        key = storage_id(storage)
        before = self._live.get(key)
        self._end(key)
        self._begin(key, storage.nbytes(), Kind.GATHERED_PARAMETERS if before is None else before.kind)
        self._follow(storage)

    def _gathers(self, args: Any, kwargs: Any) -> None:
        """Count the buffers that FSDP2 gathers into, and copies parameters out of, as gathered parameters."""
        for tensor in tensors_in((args, kwargs)):
            allocation = self._live.get(storage_id(tensor.untyped_storage()))
            if allocation is not None and allocation.kind is None:
                allocation.kind = Kind.GATHERED_PARAMETERS

    def _settle(self, phase: str, kind: Kind) -> list[_Allocation]:
        """Give a kind to the allocations of a phase that are in use and have none, and return them."""
        undecided = [a for a in self._live.values() if a.kind is None and a.phase.startswith(phase)]
        for allocation in undecided:
            allocation.kind = kind
        return undecided
