"""Turning a model's linear layers into PaCA layers, in place."""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.conversion.report import ConversionReport, report_on
from paca_lightning.conversion.revert import undone_on_error
from paca_lightning.conversion.saved_modules import is_marked, mark, original_state
from paca_lightning.conversion.scores import BY_WEIGHT, calibrate, weight_scores
from paca_lightning.conversion.targets import Target, in_features_of, resolve
from paca_lightning.core.config import CALIBRATED, PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import base_model_prefix, clean_path, relative_path
from paca_lightning.layers.base import PENDING_SELECTION, PaCALayer, paca_layers
from paca_lightning.layers.columns import check_indices, largest_indices, random_indices
from paca_lightning.layers.nf4_linear import QPaCALinear

SEEN = "_paca_seen"
"""Attribute of a converted model: the names of the parameters that it had then."""


def apply_paca(
    model: nn.Module,
    config: PaCAConfig,
    *,
    indices: Mapping[str, Tensor] | None = None,
    calibration: Iterable[Any] | None = None,
) -> ConversionReport:
    """Convert a model's target layers in place and freeze everything else.

    Applying the same configuration again changes nothing, but converts targets that have been added since.

    Args:
        model: Any module: a Hugging Face model, a LightningModule, ...
        config: What to train.
        indices: Columns by module path, for some or all layers; they override the selection.
        calibration: Batches for the selections that look at data: dictionaries are passed as keywords, tuples as
            positional arguments. For ``gradient_norm`` the model must return a loss, or an output with a ``loss``.
            ``quant_error`` weighs its errors by the activations if they are given.

    Returns:
        What was converted and what was left alone; printable.

    Raises:
        PaCAError: If a name matches nothing, a layer cannot be converted, or the model carries another configuration.
    """
    with_data = calibration is not None
    with undone_on_error(model):
        report, undecided = convert(model, config, indices, data_follows=with_data, weigh_errors=with_data)
        if undecided and calibration is not None:
            select_columns(model, config, calibration, undecided)
    return report


def convert(
    model: nn.Module,
    config: PaCAConfig,
    indices: Mapping[str, Tensor] | None = None,
    *,
    data_follows: bool,
    weigh_errors: bool = False,
) -> tuple[ConversionReport, set[str]]:
    """``apply_paca`` but for the choice of columns by data, which starts from random ones.

    Args:
        model: As there.
        config: As there.
        indices: As there.
        data_follows: Whether the caller goes on to ``select_columns``.
        weigh_errors: Whether ``quant_error`` waits for data, too.

    Returns:
        The report, and the paths of the layers whose columns data has yet to choose. They are quantized after that, so
        that their columns start from the unquantized weight.
    """
    _refuse_other_config(model, config)
    resolution = resolve(model, config)
    prefix = base_model_prefix(model)
    columns = _by_target(indices or {}, resolution.targets, prefix)
    fresh = [target for target in resolution.targets if not isinstance(target.module, PaCALayer)]
    _refuse_sharded(model, fresh)
    _refuse_other_columns(resolution.targets, columns)
    by_data = config.selection in CALIBRATED or (config.selection == "quant_error" and weigh_errors)
    undecided = {target.path for target in fresh if by_data} - columns.keys()
    if undecided and not data_follows:
        raise PaCAError(
            f"selection={config.selection!r} looks at data: pass calibration=, an iterable of batches "
            "(PaCAStrategy takes them from the training data by itself)."
        )
    originals = {path: original_state(module) for path, module in resolution.saved.items() if not is_marked(module)}
    with undone_on_error(model):
        _freeze(model)
        for target in fresh:
            chosen = columns.get(target.path)
            if chosen is None and target.path not in undecided:
                chosen = _columns_by_weight(target, config.selection)
            _convert(target, config, chosen, relative_path(target.path, prefix))
        quantize_layers(model, config, undecided)
        for _, layer in paca_layers(model):
            layer.paca_delta.requires_grad_(True)
        for path, module in resolution.saved.items():
            if path in originals:
                mark(module, originals[path])
            module.requires_grad_(True)
    vars(model)[SEEN] = frozenset(clean_path(name) for name, _ in model.named_parameters())
    return report_on(model, config, resolution), undecided


def _freeze(model: nn.Module) -> None:
    """Freeze what no conversion has seen yet: what the user thawed since the last one stays so."""
    seen: set[str] = set()
    if config_of(model) is not None:  # otherwise a merged model, which begins anew
        for path, module in model.named_modules():
            before = clean_path(path) + "." if path else ""
            seen.update(clean_path(before + name) for name in vars(module).get(SEEN, ()))
    for name, parameter in model.named_parameters():
        if clean_path(name) not in seen:
            parameter.requires_grad_(False)


def select_columns(
    model: nn.Module,
    config: PaCAConfig,
    calibration: Iterable[Any],
    undecided: set[str],
    *,
    step: Callable[[Any], Any] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> None:
    """Move layers of a converted model to the columns that calibration batches favour.

    Args:
        model: The converted model.
        config: Says by which score.
        calibration: Batches.
        undecided: Paths of the layers to move.
        step: Runs one batch and returns the model's output or loss. Default: ``model(**batch)``.
        reduce: Sums scores over ranks.

    Raises:
        PaCAError: If there is no batch or no loss, or the batches say nothing about a layer.
    """
    layers = {path: layer for path, layer in paca_layers(model) if clean_path(path) in undecided}
    by_error = config.selection == "quant_error"
    selection = "activation_norm" if by_error else config.selection
    scores = calibrate(model, layers, selection, calibration, step)
    totals = {path: reduce(score) for path, score in scores.items()}
    _check_scores(totals, config.selection)
    for path, total in totals.items():
        layer = layers[path]
        if by_error:
            total = total * weight_scores(layer, type(layer), "quant_error", clean_path(path))
        layer.move_to_columns(largest_indices(total, layer.r).to(total.device))
        layer.reread_columns()  # also where they are those that the layer began with, before the weight was cast
    quantize_layers(model, config)


def quantize_layers(model: nn.Module, config: PaCAConfig, undecided: Container[str] = ()) -> None:
    """Quantize the dense PaCA layers of a model one by one, if the configuration says so.

    Args:
        model: The converted model.
        config: Says how.
        undecided: Paths of layers that wait until their columns are chosen.

    Raises:
        PaCAError: If a weight is not finite, or is sharded already.
    """
    if config.quantize is None:
        return
    for path, layer in paca_layers(model):
        if isinstance(layer, QPaCALinear) or clean_path(path) in undecided:
            continue
        if hasattr(layer.weight, "to_local"):
            raise PaCAError(
                f"{path!r} is sharded, so it cannot be quantized any more. With selection={config.selection!r}, call "
                "apply_paca(model, config, calibration=batches) before the model is sharded."
            )
        QPaCALinear.quantize(layer, clean_path(path))


def config_of(model: nn.Module) -> PaCAConfig | None:
    """The configuration that a model was converted with, if it was."""
    configs = (vars(layer).get("_paca_config") for _, layer in paca_layers(model))
    return next((config for config in configs if config is not None), None)


def _convert(target: Target, config: PaCAConfig, chosen: Tensor | None, path: str) -> None:
    module = target.module
    # On meta there is no weight to judge by yet: whoever fills it chooses the columns then.
    pending = chosen is None and config.selection in BY_WEIGHT and module.weight.is_meta
    if chosen is None:
        chosen = random_indices(in_features_of(target.module), target.r, seed=config.seed, path=path)
    target.layer_class.adopt(module, chosen, target.scaling)
    vars(module)["_paca_config"] = config
    if pending:
        vars(module)[PENDING_SELECTION] = config.selection


def _columns_by_weight(target: Target, selection: str) -> Tensor | None:
    """The columns that a layer's own weight decides, if it does and is at hand."""
    if selection not in BY_WEIGHT or target.module.weight.is_meta:
        return None
    return largest_indices(weight_scores(target.module, target.layer_class, selection, target.path), target.r)


def _by_target(indices: Mapping[str, Tensor], targets: list[Target], prefix: str) -> dict[str, Tensor]:
    """Given columns, checked, by the path of the target."""
    by_name = {relative_path(target.path, prefix): target for target in targets} | {t.path: t for t in targets}
    if unknown := sorted(set(indices) - set(by_name)):
        raise PaCAError(f"indices are given for {unknown[:3]}, which are not among the target layers.")
    for name, chosen in indices.items():
        check_indices(chosen, in_features_of(by_name[name].module), by_name[name].r, path=name)
    return {by_name[name].path: chosen.cpu() for name, chosen in indices.items()}


def _check_scores(scores: dict[str, Tensor], selection: str) -> None:
    for path, score in scores.items():
        finite = bool(torch.isfinite(score).all())
        if not finite or not bool(score.any()):
            problem = "never reach" if finite else "give NaN or Inf in"
            raise PaCAError(
                f"selection={selection!r}: the calibration batches {problem} {path!r}, so its columns cannot be "
                "compared. Use other or more batches, list it in exclude_modules, or use selection='random'."
            )


def _refuse_other_columns(targets: list[Target], columns: dict[str, Tensor]) -> None:
    for target in targets:
        chosen, layer = columns.get(target.path), target.module
        if chosen is not None and isinstance(layer, PaCALayer) and not torch.equal(chosen, layer.paca_indices.cpu()):
            raise PaCAError(
                f"indices: {target.path!r} was converted before and trains other columns. unload(model) first."
            )


def _refuse_other_config(model: nn.Module, config: PaCAConfig) -> None:
    for path, layer in paca_layers(model):
        before = vars(layer).get("_paca_config")
        if before is not None and before != config:
            changed = [name for name, value in before.to_dict().items() if value != config.to_dict()[name]]
            raise PaCAError(
                f"{path!r} was converted before with another configuration (different: {changed}). Convert once, or "
                "unload(model) first."
            )


def _refuse_sharded(model: nn.Module, fresh: list[Target]) -> None:
    for target in fresh:
        if hasattr(target.module._parameters.get("weight"), "to_local"):
            raise PaCAError(_sharded(target.path))
    for module in model.modules() if fresh else ():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise PaCAError(_sharded(type(module).__name__))


def _sharded(what: str) -> str:
    return f"{what!r} is sharded already. Call apply_paca before fully_shard, or leave both to strategy='paca_fsdp2'."
