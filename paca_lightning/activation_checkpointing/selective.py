"""Selective activation checkpointing: keep a block's products and attention, recompute what is cheap between them.

A linear layer whose weight is frozen needs no input for its backward, so in a decoder block only norms, rotary
embeddings, activation functions and the like keep anything. All that can be computed again from the outputs of the
block's matrix products and of its attention; only these are expensive.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.linear.default}
_ATTENTION = re.compile("attention|attn|sdpa")
# What has the same values in another shape or place; ...
_MOVES = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.permute.default,
    _aten.t.default,
    _aten.transpose.int,
    _aten.view.default,
    _aten._unsafe_view.default,
}
# ... and what can be differentiated without a value of its inputs.
_VALUELESS = {*_MOVES, _aten.add.Tensor}


def contexts() -> tuple["_Forward", "_Recomputation"]:
    """What ``torch.utils.checkpoint.checkpoint(context_fn=...)`` runs a block's forward and its recomputation in.

    The forward's products and attention are kept, and the recomputation takes them from there, except for

    * a product whose values no backward needs, such as that of a pre-norm block's last layer, which is only added to
      something: neither kept nor recomputed;
    * the product right behind attention, and products at most a quarter as wide as their input, such as the keys and
      values of grouped-query attention: recomputed, as they take little time;
    * a product that is changed in place: recomputed.

    Gradients are bitwise those without checkpointing.
    """
    calls: list[_Call] = []
    return _Forward(calls), _Recomputation(calls)


@dataclass(eq=False)
class _Call:
    """A call of an expensive operator.

    Attributes:
        func: The operator.
        output: What it returned; None to compute it again.
        stand_in: Shape, dtype and device of a product.
        needed: Whether anything is computed from its values but by operators whose backward uses none.
    """

    func: Any
    output: Any
    stand_in: tuple[torch.Size, torch.dtype, torch.device] | None
    needed: bool


class _Forward(TorchDispatchMode):
    """Records the calls of expensive operators, and whether the values of their outputs are used."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls
        # By storage: the calls whose outputs it is a sum of; and the storages that hold attention's output.
        self._summands: dict[int, set[_Call]] = {}
        self._attended: set[int] = set()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operators on the local tensors
        output = func(*args, **(kwargs or {}))
        read, returned = _storages((args, kwargs)), _storages(output)
        if not returned and not func._schema.is_mutable:
            return output  # a size, a device
        summands = {call for key in read for call in self._summands.get(key, ())}
        if func not in _VALUELESS:
            for call in summands:
                call.needed = True
            summands = set()
        if func._schema.is_mutable:
            self._recompute_what_is_written(func, args, kwargs or {})
        attends = _ATTENTION.search(func.name()) is not None
        attended = any(key in self._attended for key in read)
        if attends or func in _PRODUCTS:
            # Detached, or what is kept would hold the graph that leads to it, and so itself.
            cheap = func in _PRODUCTS and (attended or 4 * output.shape[-1] <= _input(func, args).shape[-1])
            kept = None if cheap else tree_map_only(Tensor, Tensor.detach, output)
            stand_in = None if attends else (output.shape, output.dtype, output.device)
            call = _Call(func, kept, stand_in, needed=attends)
            self._calls.append(call)
            summands = {call}
        # Addresses are used again, so that every output says anew what it is.
        for key in returned:
            self._summands[key] = summands
            if attends or (attended and func in _MOVES):
                self._attended.add(key)
            else:
                self._attended.discard(key)
        return output

    def _recompute_what_is_written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        arguments = func._schema.arguments
        passed = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        written = _storages(
            [passed.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        )
        for call in self._calls:
            if not written.isdisjoint(_storages(call.output)):
                call.output, call.needed = None, True

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._summands.clear()
        for call in self._calls:
            if not call.needed:
                call.output = None


class _Recomputation(TorchDispatchMode):
    """Answers the calls of expensive operators from what the forward recorded."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self._calls = calls
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
        if func not in _PRODUCTS and _ATTENTION.search(func.name()) is None:
            return func(*args, **(kwargs or {}))
        if not self._calls or self._calls[0].func is not func:
            raise RuntimeError(f"A selectively checkpointed block called {func.name()} in its recomputation only.")
        # Taken out, so that autograd decides how long it lives.
        call = self._calls.pop(0)
        if not call.needed:
            shape, dtype, device = cast(tuple[torch.Size, torch.dtype, torch.device], call.stand_in)
            # Takes no memory, and would not go unnoticed.
            return torch.full((), math.nan, dtype=dtype, device=device).expand(shape)
        return func(*args, **(kwargs or {})) if call.output is None else call.output


def _input(func: Any, args: Any) -> Tensor:
    """What a product multiplies its weight by."""
    return cast(Tensor, args[1 if func is _aten.addmm.default else 0])


def _storages(tree: Any) -> set[int]:
    """Addresses of the storages of all tensors in a tree."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
