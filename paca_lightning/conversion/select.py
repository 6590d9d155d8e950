"""Choosing the columns of converted layers by data, and quantizing the layers after that."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.conversion.scores import calibrate, weight_scores
from paca_lightning.core.config import BY_ERROR, PaCAConfig
from paca_lightning.core.dtensor import is_sharded, local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import is_fake
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import largest_indices
from paca_lightning.layers.nf4 import check_finite
from paca_lightning.layers.nf4_linear import QPaCALinear

LARGEST_STEP = 3
"""Largest power of two of a column's step, and of its inverse."""


def waits_for_data(layer: PaCALayer) -> bool:
    """Whether data has yet to choose a layer's columns."""
    return layer.paca_pending is not None and layer.paca_pending.by_data


def select_columns(
    model: nn.Module,
    layers: Mapping[str, PaCALayer],
    config: PaCAConfig,
    calibration: Iterable[Any],
    *,
    step: Callable[[Any], Any] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> None:
    """Move the layers that wait for data to the columns that calibration batches favour, then quantize them.

    Where the configuration says so, each column also gets a step that fits its input.

    Args:
        model: The converted model.
        layers: Its PaCA layers by path.
        config: Says by which score.
        calibration: Batches.
        step: Runs one batch and returns the model's output or loss. Default: ``model(**batch)``.
        reduce: Sums scores over ranks.

    Raises:
        PaCAError: If there is no batch or no loss, or the batches say nothing about a layer.
    """
    waiting = {path: layer for path, layer in layers.items() if waits_for_data(layer)}
    if config.steps_by_input:
        calibration = list(calibration)  # seen twice: once for the columns, once for their steps
    if waiting:
        _choose(model, waiting, config, calibration, step, reduce)
    if config.steps_by_input and not any(map(has_own_steps, layers.values())):
        fit_steps(layers, calibrate(model, layers, "activation_norm", calibration, step), reduce)
    quantize_layers(layers, config)


def _choose(
    model: nn.Module,
    waiting: Mapping[str, PaCALayer],
    config: PaCAConfig,
    calibration: Iterable[Any],
    step: Callable[[Any], Any] | None,
    reduce: Callable[[Tensor], Tensor],
) -> None:
    by_error = config.selection in BY_ERROR
    scores = calibrate(model, waiting, "activation_norm" if by_error else config.selection, calibration, step)
    totals = {path: reduce(score) for path, score in scores.items()}
    _check_scores(totals, config.selection)
    for path, total in totals.items():
        layer = waiting[path]
        if by_error:
            total = total * weight_scores(layer, type(layer), config.selection, path).to(total.device)
        layer.move_to_columns(largest_indices(total, layer.r).to(layer.paca_indices.device))
        settle_columns(layer)


def has_own_steps(layer: PaCALayer) -> bool:
    """Whether data has fitted the steps of a layer's columns."""
    return layer.paca_scale is not None and bool((layer.paca_scale != 1).any())


@torch.no_grad()
def fit_steps(
    layers: Mapping[str, PaCALayer], squares: Mapping[str, Tensor], reduce: Callable[[Tensor], Tensor]
) -> None:
    """Give each column a step that fits its input: the layer's rms over the column's own, as a power of two.

    A power of two changes no bit of a mantissa, so deltas, weights and adapters stay exact. The weight stays as it is:
    a delta that is there already is expressed in the new steps.

    Args:
        layers: By path.
        squares: Sum of squares of each input channel of each layer, shape (in_features,).
        reduce: Sums over ranks.
    """
    for path, layer in layers.items():
        total = reduce(squares[path]).float()
        ratio = (total.mean() / total.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        steps = torch.exp2(ratio.log2().round().clamp(-LARGEST_STEP, LARGEST_STEP))
        if not bool(torch.isfinite(steps).all()) or not bool(total.any()):
            steps = torch.ones_like(total)  # no batch reached the layer, or a batch had NaN
        indices = layer.paca_indices.to(steps.device)
        change_steps(layer, steps[indices].to(layer.paca_indices.device))


@torch.no_grad()
def change_steps(layer: PaCALayer, steps: Tensor) -> None:
    """Let the columns of a layer move by other steps from now on; what the weight holds stays.

    Args:
        layer: The layer.
        steps: Powers of two, shape (r,).
    """
    assert layer.paca_scale is not None, "conversions whose columns move by other steps begin with steps of 1"
    delta = local(layer.paca_delta)
    delta.mul_((layer.paca_scale / steps).to(delta.device))
    layer.paca_scale.copy_(steps)
    layer.write_columns()


def settle_columns(layer: PaCALayer) -> None:
    """Take the columns as chosen, and read the base columns again: the weight may have been cast since."""
    layer.reread_columns()
    layer.paca_pending = None


def quantize_layers(layers: Mapping[str, PaCALayer], config: PaCAConfig) -> None:
    """Quantize dense PaCA layers one by one, if the configuration says so; not those that wait for data.

    Args:
        layers: By path.
        config: Says how.

    Raises:
        PaCAError: If a weight is not finite, or is sharded already.
    """
    ready = {path: layer for path, layer in layers.items() if not waits_for_data(layer)}
    check_quantizable(ready, config)
    for path, layer in ready.items() if config.quantize is not None else ():
        if not isinstance(layer, QPaCALinear):
            QPaCALinear.quantize(layer, path)


def check_quantizable(layers: Mapping[str, PaCALayer], config: PaCAConfig) -> None:
    """Raise if a layer cannot be quantized, before the first one is, which cannot be undone.

    Raises:
        PaCAError: If the configuration quantizes, and a weight is not finite, or is sharded already.
    """
    if config.quantize is None:
        return
    for path, layer in layers.items():
        if isinstance(layer, QPaCALinear):
            continue
        if is_sharded(layer.weight):
            raise PaCAError(
                f"{path!r} is sharded, so it cannot be quantized any more. With selection={config.selection!r}, call "
                "apply_paca(model, config, calibration=batches) before the model is sharded."
            )
        if layer.weight.numel() and not (layer.weight.is_meta or is_fake(layer.weight)):
            check_finite(layer.weight, path)


def _check_scores(scores: dict[str, Tensor], selection: str) -> None:
    for path, score in scores.items():
        finite = bool(torch.isfinite(score).all())
        if not finite or not bool(score.any()):
            problem = "never reach" if finite else "give NaN or Inf in"
            raise PaCAError(
                f"selection={selection!r}: the calibration batches {problem} {path!r}, so its columns cannot be "
                "compared. Use other or more batches, list it in exclude_modules, or use selection='random'."
            )
