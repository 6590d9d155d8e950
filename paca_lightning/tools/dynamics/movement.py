"""How far, and in which direction, the columns of each layer moved, from the adapters alone."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paca_lightning.adapters.files import SETTINGS
from paca_lightning.adapters.saved import read_adapter
from paca_lightning.core.errors import PaCAError

Movement = dict[str, Any]
"""``layer``, ``kind``, ``norm``, ``rms``, ``cosine`` and ``effective_rank`` of a layer at a step."""


def updates_of(adapter: Path) -> dict[str, Tensor]:
    """What each layer's columns changed by, scaling included: (out_features, r), fp64, by layer path.

    Raises:
        PaCAError: If the adapter is damaged or incomplete.
    """
    saved = read_adapter(adapter)
    if saved.settings is None:
        raise PaCAError(f"{adapter} has no {SETTINGS}, which AdapterHistory writes. Copy it again.")
    scalings = saved.settings.scalings
    return {path: delta.double() * scalings[path] for path, delta in saved.tensors.deltas.items()}


def movements(updates: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> list[Movement]:
    """How each layer moved.

    Args:
        updates: At a step, of which adapters of one history have the same layers and columns.
        last: At the last step.

    Returns:
        For each layer ``norm`` (Frobenius), ``rms`` of an entry, ``cosine`` to the last update, ``effective_rank`` (see
        :func:`effective_rank`); the last two are None for a layer that has not moved.
    """
    found = []
    for path, update in updates.items():
        norm = float(update.norm())
        size = norm * float(last[path].norm())
        found.append(
            {
                "layer": path,
                "kind": path.rpartition(".")[2],
                "norm": norm,
                "rms": norm / math.sqrt(update.numel()),
                "cosine": float((update * last[path]).sum()) / size if size else None,
                "effective_rank": effective_rank(update),
            }
        )
    return found


def effective_rank(update: Tensor) -> float | None:
    """In how many directions a matrix acts: the exponential of its singular values' entropy (Roy & Vetterli 2007).

    It lies between 1 and r. None for a matrix of zeros.

    Args:
        update: Shape (out_features, r), fp64; of stacked experts (experts, out_features, r), whose rows are all taken.
    """
    update = update.flatten(0, -2)
    gram = update.T @ update if update.shape[0] >= update.shape[1] else update @ update.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not (total := float(values.sum())):
        return None
    shares = values[values > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def shares_by_kind(layers: Iterable[Movement]) -> dict[str, float]:
    """The share of each kind of layer (``q_proj``, ...) in the squared norm of all; zeros if nothing moved."""
    squares: dict[str, float] = {}
    for layer in layers:
        squares[layer["kind"]] = squares.get(layer["kind"], 0.0) + layer["norm"] ** 2
    total = sum(squares.values())
    return {kind: square / total if total else 0.0 for kind, square in squares.items()}


def whole_movement(updates: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> tuple[float, float | None]:
    """Norm of all layers' updates together, and their cosine to the last ones; None if nothing moved."""
    norm, size = (math.sqrt(sum(float(u.square().sum()) for u in of.values())) for of in (updates, last))
    along = sum(float((update * last[path]).sum()) for path, update in updates.items())
    return norm, along / (norm * size) if norm * size else None
