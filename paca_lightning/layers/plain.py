"""The forward in plain operators, for transforms that autograd functions do not take part in.

``torch.func`` (vmap, grad, jvp, functional_call), forward-mode differentiation and ``torch.jit.trace`` see operators
only, and may give a layer another delta than the one its weight was written with. There a layer computes its weight
from the delta, as a part of the graph: as slow and large as a dense gradient, and right to any order.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import is_expanded_weight, transforms_are_active
from paca_lightning.layers.columns import trained_columns


def is_replaced(delta: Tensor) -> bool:
    """Whether a delta takes the place of a layer's own parameter for a call, as ``functional_call`` makes it."""
    return not isinstance(delta, nn.Parameter)


def inside_transform() -> bool:
    """Whether the caller runs inside a transform that needs plain operators; torch.compile is none."""
    return not torch.compiler.is_compiling() and (torch.jit.is_tracing() or transforms_are_active())  # type: ignore[attr-defined]


def with_columns(
    weight: Tensor,
    columns: Tensor,
    delta: Tensor | None,
    indices: Tensor,
    scaling: float | Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """A new weight with the trained columns, differentiable with respect to the delta.

    Args:
        weight: Shape (out_features, in_features), or its transpose; or one for each of several experts.
        columns: Base columns, shape (out_features, r), or one for each expert.
        delta: Update of the columns, shaped like them. None: the weight as it is.
        indices: Selected columns, shape (r,), int64.
        scaling: ``alpha / r``, or a number for each column, shape (r,).
        transposed: Whether the weight is the transpose.

    Raises:
        PaCAError: If the delta is an ``ExpandedWeight``, which takes part in few operators.
    """
    if delta is None:
        return weight
    if is_expanded_weight(delta):
        raise PaCAError(
            "ExpandedWeight (call_for_per_sample_grads) cannot compute a PaCA layer's gradients per sample. Use "
            "torch.func.vmap over torch.func.grad, with the deltas passed to torch.func.functional_call."
        )
    trained = trained_columns(columns, delta, scaling).to(weight.dtype)
    return weight.index_copy(-2, indices, trained.mT) if transposed else weight.index_copy(-1, indices, trained)


def on_jagged_rows(forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Apply a layer to the rows of a jagged tensor.

    Args:
        forward: From (rows, ..., in_features) to (rows, ..., out_features).
        input: Nested tensor of shape (batch, jagged, ..., in_features).

    Returns:
        Nested tensor of shape (batch, jagged, ..., out_features), jagged like the input.

    Raises:
        PaCAError: If its layout is another, or another dimension is jagged.
    """
    if input.layout != torch.jagged or isinstance(input.shape[1], int):
        raise PaCAError(
            "A PaCA layer takes nested tensors of shape (batch, jagged, ..., in_features) with layout=torch.jagged. "
            "Build them with torch.nested.nested_tensor(..., layout=torch.jagged)."
        )
    return torch.nested.nested_tensor_from_jagged(forward(input.values()), input.offsets(), input.lengths())
