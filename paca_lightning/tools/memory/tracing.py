"""Memory of a training step, allocation by allocation, without the memory: for tensors that have no data.

Every operator that PyTorch dispatches inside a :class:`MemoryTracer` may allocate storages, and they end when nothing
refers to them. What an operator allocates and frees within its kernel is not seen, nor are an allocator's gaps.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
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


class Kind(IntEnum):
    """What memory is used for.

    ``ACTIVATIONS`` is what a forward leaves for the backward, and what is recomputed there; ``TEMPORARY`` what lives
    within the forward, the backward or the optimizer's step, such as gradients of activations.
    """

    PARAMETERS = 0
    GATHERED_PARAMETERS = 1
    ACTIVATIONS = 2
    GRADIENTS = 3
    OPTIMIZER = 4
    TEMPORARY = 5


@dataclass
class _Allocation:
    size: int
    start: int
    phase: str
    kept: bool  # whether autograd may keep it: it was made where gradients are recorded
    kind: Kind | None = None
    end: int | None = None


@dataclass(frozen=True)
class Timeline:
    """Memory in use after each operator of a step that changed it.

    Attributes:
        phases: Name of the phase of each operator.
        sizes: Bytes in use by kind, shape (operators, kinds).
        trainable_parameters: How many numbers are trained, on all devices together.
    """

    phases: list[str]
    sizes: np.ndarray
    trainable_parameters: int

    @property
    def peak(self) -> int:
        """Most bytes in use at once."""
        return int(self.sizes.sum(1).max())

    @property
    def peak_phase(self) -> str:
        """Where the peak lies."""
        return self.phases[int(self.sizes.sum(1).argmax())]

    @property
    def at_peak(self) -> dict[Kind, int]:
        """Bytes by kind at the peak."""
        row = self.sizes[int(self.sizes.sum(1).argmax())]
        return {kind: int(row[kind]) for kind in Kind}


class MemoryTracer(TorchDispatchMode):
    """Records which storages begin and end between operators.

    Phases are entered with :meth:`enter`; their names begin with ``forward``, ``backward`` or ``optimizer``.
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
        """Count tensors as in use, for what they are used."""
        for tensor in tensors:
            self._see(local(tensor.detach()).untyped_storage()).kind = kind

    def enter(self, phase: str) -> None:
        """Begin a phase of the step."""
        self._phase = phase

    @property
    def phase(self) -> str:
        """The phase that the step is in."""
        return self._phase

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is allocated inside lies in another memory than the device's."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def end_forward(self) -> None:
        """What is in use now and was allocated in the forward waits for the backward."""
        self._decide("forward", Kind.ACTIVATIONS)

    def end_backward(self, *, elsewhere: bool = False) -> None:
        """What is in use now and was allocated in the backward is gradients, ``elsewhere`` in another memory."""
        for allocation in self._decide("backward", Kind.GRADIENTS):
            allocation.size *= not elsewhere

    def in_use(self, kind: Kind) -> int:
        """Bytes of a kind that are in use now."""
        return sum(allocation.size for allocation in self._live.values() if allocation.kind is kind)

    def timeline(self, trainable_parameters: int) -> Timeline:
        """What was recorded so far."""
        count = len(self._phases)
        changes = np.zeros((count + 1, len(Kind)), dtype=np.int64)
        for allocation in self._allocations:
            kind = allocation.kind
            if kind is None:
                recomputed = allocation.phase.startswith("backward") and allocation.kept
                kind = Kind.ACTIVATIONS if recomputed else Kind.TEMPORARY
            changes[min(allocation.start, count), kind] += allocation.size
            if allocation.end is not None:
                changes[min(allocation.end, count), kind] -= allocation.size
        sizes = changes.cumsum(0)[:count]
        # Views and the like change nothing, and PyTorch caches some: without them, equal steps give equal timelines.
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

        # FSDP2 frees and allocates gathered parameters this way, which is no operator.
        UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    @override
    def __exit__(self, *args: Any) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*args)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operators on the local tensors
        # Waiting returns its argument in truth; for tensors without data, PyTorch returns a new one.
        result = args[0] if awaits_collective(func) else func(*args, **(kwargs or {}))
        if active_fake_mode() is not self._fake_mode:
            return result  # DTensor works out a result's shape under a fake mode of its own
        for tensor in tensors_in(result):
            if tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        if func.name() in GATHERING_OPERATORS:
            self._gathers(args, kwargs or {})
        self._phases.append(self._phase)
        return result

    def _see(self, storage: UntypedStorage) -> _Allocation:
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
        self._end(key)
        self._references.pop(key, None)

    def _resized(self, storage: UntypedStorage) -> None:
        key = storage_id(storage)
        before = self._live.get(key)
        self._end(key)
        self._begin(key, storage.nbytes(), Kind.GATHERED_PARAMETERS if before is None else before.kind)
        self._see(storage)

    def _gathers(self, args: Any, kwargs: Any) -> None:
        """Mark what FSDP2 gathers into, and from there copies out of."""
        for tensor in tensors_in((args, kwargs)):
            allocation = self._live.get(storage_id(tensor.untyped_storage()))
            if allocation is not None and allocation.kind is None:
                allocation.kind = Kind.GATHERED_PARAMETERS

    def _decide(self, phase: str, kind: Kind) -> list[_Allocation]:
        undecided = [a for a in self._live.values() if a.kind is None and a.phase.startswith(phase)]
        for allocation in undecided:
            allocation.kind = kind
        return undecided
