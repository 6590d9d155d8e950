"""Choosing columns: pure functions from seeds and scores to indices, and checks of indices."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError


@dataclass(frozen=True)
class PendingSelection:
    """A selection of columns that cannot be made yet.

    Attributes:
        score: What the columns are chosen by, such as ``weight_norm``.
        by_data: Whether it waits for training data. Otherwise it waits for the weight, which is on the meta device.
    """

    score: str
    by_data: bool


def random_indices(in_features: int, r: int, *, seed: int, path: str) -> Tensor:
    """Columns drawn at random from the seed and the layer's path alone.

    The global random state has no influence, so the draw is the same on every rank, machine and run.

    Args:
        in_features: Columns to choose from.
        r: Columns to choose.
        seed: Seed of the whole conversion.
        path: Path of the layer. It makes the draws of two layers differ.

    Returns:
        Sorted, unique indices, shape (r,), int64, on the CPU.
    """
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(in_features, generator=generator, device="cpu")[:r].sort().values


def largest_indices(scores: Tensor, r: int) -> Tensor:
    """Columns of the ``r`` largest scores. Of equal scores the earlier column wins, on every device.

    Args:
        scores: A score for each column, shape (in_features,).
        r: Columns to choose.

    Returns:
        Sorted, unique indices, shape (r,), int64, on the CPU.
    """
    order = torch.sort(scores.detach().cpu(), descending=True, stable=True).indices
    return order[:r].sort().values


def check_indices(indices: Tensor, in_features: int, r: int, *, path: str) -> None:
    """Raise unless the indices are ``r`` sorted, unique columns of a layer.

    Raises:
        PaCAError: Naming the layer and what is wrong with its indices.
    """
    problem = None
    if indices.dtype != torch.int64:
        problem = f"are {indices.dtype}, not torch.int64"
    elif tuple(indices.shape) != (r,):
        problem = f"have shape {tuple(indices.shape)}, not ({r},)"
    elif int(indices.min()) < 0 or int(indices.max()) >= in_features:
        problem = f"reach from {int(indices.min())} to {int(indices.max())}, outside the {in_features} input columns"
    elif bool((indices[1:] <= indices[:-1]).any()):
        problem = "are not sorted and unique"
    if problem:
        raise PaCAError(f"The column indices of {path!r} {problem}. Were they made for this model?")


def column_factor(scaling: float, scale: Tensor | None) -> float | Tensor:
    """What the columns of a delta are multiplied by in the weight: the scaling, times each column's step (r,)."""
    if scale is None:
        return scaling
    return scale if scaling == 1.0 else scale * scaling


def trained_columns(columns: Tensor, delta: Tensor, factor: float | Tensor) -> Tensor:
    """``columns + factor * delta``, shape (out_features, r), in the wider dtype of both.

    Args:
        columns: Base columns, shape (out_features, r).
        delta: Shape (out_features, r).
        factor: One number, or one for each column, shape (r,).
    """
    return columns + delta * factor if isinstance(factor, Tensor) else torch.add(columns, delta, alpha=factor)


def is_expanded(weight: Tensor) -> bool:
    """Whether elements of a weight share memory, as those of an expanded view: writing one column changes others."""
    return any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True))


def check_not_parametrized(layer: nn.Module, weight: Tensor, path: str) -> None:
    """Raise if a layer's weight or bias is computed from other tensors: a write to the weight would be lost.

    Args:
        layer: The layer.
        weight: What it has as its weight.
        path: Names it in the error.

    Raises:
        PaCAError: If so.
    """
    if not isinstance(weight, nn.Parameter) or parametrize.is_parametrized(layer):
        raise PaCAError(
            f"{path!r} was parametrized after its conversion (spectral norm, weight norm, pruning): its weight is "
            "computed anew for each forward, and columns written into it would be lost. Parametrize first, which "
            "leaves the layer out of the conversion, or remove the parametrization."
        )


def check_loaded_columns(
    delta: Tensor | None, indices: Tensor | None, shape: Sequence[int], in_features: int, *, path: str
) -> None:
    """Raise unless a state dict has both delta and indices of a layer or neither, and they fit.

    Args:
        delta: Its delta for the layer, if it has one.
        indices: Its indices for the layer, if it has some.
        shape: Of the layer's delta.
        in_features: Of the layer.
        path: Names the layer in the error.

    Raises:
        PaCAError: If they do not fit.
    """
    if (delta is None) != (indices is None):
        present, missing = ("paca_delta", "paca_indices") if indices is None else ("paca_indices", "paca_delta")
        raise PaCAError(f"The checkpoint has {present} of {path!r} but not its {missing}. It is incomplete.")
    if delta is not None and tuple(delta.shape) != tuple(shape):
        raise PaCAError(
            f"The delta of {path!r} has shape {tuple(delta.shape)} in the checkpoint and {tuple(shape)} in the "
            "model. Use the rank and the base model it was trained with."
        )
    if indices is not None and not indices.is_meta:
        check_indices(local(indices), in_features, shape[-1], path=path)
