"""Weight averaging beside a method: an averaged model's weights are written from its averaged deltas."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import averaged_model
from paca_lightning.layers.base import paca_layers
from paca_lightning.layers.linear4bit import linear4bit_class
from paca_lightning.layers.nf4_linear import QPaCALinear
from paca_lightning.layers.nf4_plain import NF4Linear
from paca_lightning.layers.rows import write_all_rows

Averaging = (WeightAveraging, StochasticWeightAveraging)


def check_order(trainer: Trainer, callback: Callback) -> None:
    """Raise if an averaging callback would copy the model before ``callback`` converts it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(callback)]
    for other in before:
        if isinstance(other, Averaging):
            raise PaCAError(
                f"{type(other).__name__} is listed before {type(callback).__name__}, so it would average a copy made "
                f"before the conversion. List {type(callback).__name__} first."
            )


def copies_without_asking(trainer: Trainer) -> bool:
    """Whether a callback copies the module in its ``setup`` before ``configure_model`` has run."""
    return any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]


def check_bases(trainer: Trainer, model: nn.Module) -> None:
    """Raise if an averaging callback would average the packed bytes of quantized layers."""
    averaging = [c for c in trainer.callbacks if isinstance(c, Averaging)]  # type: ignore[attr-defined]
    quantized = [path for path, layer in model.named_modules() if isinstance(layer, _quantized_classes())]
    if averaging and quantized:
        raise PaCAError(
            f"{type(averaging[0]).__name__} averages all tensors of a model, and the packed NF4 weights of "
            f"{quantized[0]!r} have no mean. Leave the callback out, or use a base that is not quantized."
        )


def _quantized_classes() -> tuple[type[nn.Module], ...]:
    linear4bit = linear4bit_class()
    return (QPaCALinear, NF4Linear) if linear4bit is None else (QPaCALinear, NF4Linear, linear4bit)


@torch.no_grad()
def correct_averages(trainer: Trainer, model: nn.Module) -> None:
    """Write the weights of every averaged model from its averaged deltas, and copy its indices.

    Averaging treats all tensors alike. But the mean of rounded weights is not the rounded mean, and the mean of integer
    indices may be truncated to a neighbour.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = averaged_model(callback) if isinstance(callback, Averaging) else None
        if average is None:
            continue
        copies = [layer for _, layer in paca_layers(average)]
        originals = [layer for _, layer in paca_layers(model)]
        for copy, original in zip(copies, originals, strict=True):
            copy.paca_indices.copy_(original.paca_indices)
            if copy.paca_scale is not None and original.paca_scale is not None:
                copy.paca_scale.copy_(original.paca_scale)
            # Data may have moved the columns since the copy was made; they are frozen, so their mean is themselves.
            local(copy.paca_base_columns).copy_(local(original.paca_base_columns))
            copy.write_columns()
        write_all_rows(average)
