"""Selective activation checkpointing: keep the outputs of GEMMs and attention, recompute what is cheap between them.

A linear layer with a frozen weight does not need its input in the backward, so in a decoder block only norms, rotary
embeddings, activation functions and the like save tensors. All of these can be recomputed from the outputs of the
block's GEMMs and of its attention, which are the only expensive operators.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from paca_lightning.activation_checkpointing.generators import GeneratorStates
from paca_lightning.core.private.torch import (
    UNSAFE_VIEW,
    TorchDispatchMode,
    is_mutable,
    map_tensors,
    storage_id,
    tensors_in,
    written_arguments,
)

_aten = torch.ops.aten
_GEMMS = {_aten.mm.default, _aten.addmm.default, _aten.linear.default}
_ATTENTION = re.compile("attention|attn|sdpa")
# Operators that only change the shape or the place of values.
_MOVES = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.permute.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.view.default,
    UNSAFE_VIEW,
}
# Operators whose backward uses no value of their inputs.
_VALUELESS = {*_MOVES, _aten.add.Tensor}


def contexts() -> tuple["_Forward", "_Recomputation"]:
    """The two contexts for ``torch.utils.checkpoint.checkpoint(context_fn=...)``: forward and recomputation.

    The outputs of GEMMs and attention in the forward are kept, and the recomputation reuses them. Exceptions:

    * A GEMM whose values no backward needs is neither kept nor recomputed. An example is the last layer of a pre-norm
      block, whose output is only added to the residual stream.
    * The GEMM right after attention, and GEMMs at most a quarter as wide as their input (keys and values in
      grouped-query attention), are recomputed: they take little time.
    * A GEMM whose output is changed in place is recomputed.

    Gradients are bitwise those without checkpointing. Attention that draws random numbers (dropout) is kept together
    with the state in which it left the generators, so that later dropout draws the same mask again.
    """
    calls: list[_Call] = []
    return _Forward(calls), _Recomputation(calls)


@dataclass(eq=False)
class _Call:
    """A call of an expensive operator.

    Attributes:
        func: The operator.
        output: What it returned. None: recompute it.
        stand_in: Shape, dtype and device of a GEMM's output.
        needed: Whether an operator whose backward uses values reads the output.
        generators: States of the generators after attention, which may draw random numbers. None for a GEMM.
    """

    func: Any
    output: Any
    stand_in: tuple[torch.Size, torch.dtype, torch.device] | None
    needed: bool
    generators: GeneratorStates | None


class _Forward(TorchDispatchMode):
    """Records the calls of expensive operators, and whether the values of their outputs are used."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self.calls = calls
        self._summands: dict[int, set[_Call]] = {}  # by storage: the calls of whose outputs it is the sum
        self._attended: set[int] = set()  # storages that hold the output of attention

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the same operator follows on the local tensors
        output = func(*args, **(kwargs or {}))
        read, returned = _storages((args, kwargs)), _storages(output)
        if not returned and not is_mutable(func):
            return output  # a size or a device
        summands = {call for key in read for call in self._summands.get(key, ())}
        if func not in _VALUELESS:
            for call in summands:
                call.needed = True
            summands = set()
        if is_mutable(func):
            self._recompute_what_is_written(func, args, kwargs or {})
        attends = _ATTENTION.search(func.name()) is not None
        attended = any(key in self._attended for key in read)
        if attends or func in _GEMMS:
            call = _recorded(func, args, output, attends=attends, attended=attended)
            self.calls.append(call)
            summands = {call}
        # The allocator reuses addresses, so every output overwrites what its storage meant before.
        for key in returned:
            self._summands[key] = summands
            if attends or (attended and func in _MOVES):
                self._attended.add(key)
            else:
                self._attended.discard(key)
        return output

    def _recompute_what_is_written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        written = _storages(written_arguments(func, args, kwargs))
        for call in self.calls:
            if not written.isdisjoint(_storages(call.output)):
                call.output, call.needed = None, True

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._summands.clear()
        for call in self.calls:
            if not call.needed:
                call.output = None


class _Recomputation(TorchDispatchMode):
    """Answers the calls of expensive operators from what the forward recorded."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self.calls = calls
        self._used = False

    @override
    def __enter__(self) -> "_Recomputation":
        if self._used:
            raise RuntimeError(
                "A selectively checkpointed block is differentiated twice. Checkpoint it in full instead."
            )
        self._used = True
        return super().__enter__()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func not in _GEMMS and _ATTENTION.search(func.name()) is None:
            return func(*args, **(kwargs or {}))
        if not self.calls or self.calls[0].func is not func:
            raise RuntimeError(f"A selectively checkpointed block called {func.name()} in its recomputation only.")
        call = self.calls.pop(0)  # autograd alone decides how long its output lives
        if not call.needed:
            shape, dtype, device = cast(tuple[torch.Size, torch.dtype, torch.device], call.stand_in)
            # Takes no memory, and NaN would be noticed if its values were used after all.
            return torch.full((), math.nan, dtype=dtype, device=device).expand(shape)
        if call.output is None:
            return func(*args, **(kwargs or {}))
        if call.generators is not None:
            call.generators.restore()
        return call.output


def _recorded(func: Any, args: Any, output: Any, *, attends: bool, attended: bool) -> _Call:
    """The record of a call: of attention, or of a GEMM whose input may come from attention (``attended``)."""
    cheap = not attends and (attended or 4 * output.shape[-1] <= _gemm_input(func, args).shape[-1])
    # Detached: the output itself would hold the graph that leads to it, and so itself.
    kept = None if cheap else map_tensors(Tensor.detach, output)
    if not attends:
        return _Call(func, kept, (output.shape, output.dtype, output.device), needed=False, generators=None)
    devices = {tensor.device for tensor in tensors_in(output)}
    return _Call(func, kept, None, needed=True, generators=GeneratorStates(devices))


def _gemm_input(func: Any, args: Any) -> Tensor:
    """The activation that a GEMM multiplies by its weight."""
    return cast(Tensor, args[1 if func is _aten.addmm.default else 0])


def _storages(tree: Any) -> set[int]:
    """Addresses of the storages of all tensors in a tree."""
    return {storage_id(tensor.untyped_storage()) for tensor in tensors_in(tree)}
