"""Turning a model's linear layers into PaCA layers, in place."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.conversion.changed_state import remember_buffers, remember_thawed
from paca_lightning.conversion.inventory import Inventory, take_inventory
from paca_lightning.conversion.new_modules import with_new_modules
from paca_lightning.conversion.new_rows import find_new_rows
from paca_lightning.conversion.report import ConversionReport, report_on
from paca_lightning.conversion.revert import taken_back_on_error, undone_on_error
from paca_lightning.conversion.saved_modules import is_marked, mark, original_state
from paca_lightning.conversion.scores import BY_WEIGHT, refuse_quantized, weight_scores
from paca_lightning.conversion.select import quantize_layers, select_columns
from paca_lightning.conversion.stacked import weight_of
from paca_lightning.conversion.state import Conversion, conversions_of, rooted_conversion
from paca_lightning.conversion.targets import FROZEN, Target, in_features_of, resolve
from paca_lightning.conversion.trained_along import find_trained_along
from paca_lightning.core.config import BY_ERROR, CALIBRATED, PaCAConfig
from paca_lightning.core.dtensor import is_sharded
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import ROWS
from paca_lightning.layers.along import train_along
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import PendingSelection, check_indices, largest_indices, random_indices
from paca_lightning.layers.linear4bit import keep_plain_layout
from paca_lightning.layers.rows import row_modules, train_rows

NO_BASE = (".paca_delta", ".paca_base_columns", f".{ROWS}")
"""Ends of the names of parameters that a conversion adds."""


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
            ``quant_error`` weighs its errors by the activations if they are given, as ``output_error`` does.

    Returns:
        What was converted and what was left alone and why; printable.

    Raises:
        PaCAError: If a name matches nothing, a layer cannot be converted, or the model carries another configuration.
            The model is then as it was.
    """
    with_data = calibration is not None
    inventory = take_inventory(model)
    with undone_on_error(inventory):
        report = convert(
            inventory, config, indices, data_follows=with_data, weigh_errors=with_data, quantize=not with_data
        )
        if calibration is not None:  # quantizes at its end: the batches may still fail
            select_columns(model, inventory.layers, config, calibration)
    return report


def convert(
    inventory: Inventory,
    config: PaCAConfig,
    indices: Mapping[str, Tensor] | None = None,
    *,
    data_follows: bool,
    weigh_errors: bool = False,
    left: Iterable[str] = (),
    quantize: bool = True,
) -> ConversionReport:
    """Convert like ``apply_paca``, but leave layers whose columns data chooses on random ones, marked as pending.

    They are quantized only after ``select_columns``, so that their columns start from the unquantized weight.

    Args:
        inventory: Of the model. Call this within ``undone_on_error``.
        config: As for ``apply_paca``.
        indices: As for ``apply_paca``.
        data_follows: Whether the caller goes on to ``select_columns``.
        weigh_errors: Whether ``quant_error`` waits for data, too.
        left: Layers that were frozen by hand where the adapter to load was trained, by path from the base model.
        quantize: Whether to quantize, if the settings say so. It cannot be undone: a caller that may still refuse the
            model does it after its checks.

    Raises:
        PaCAError: As for ``apply_paca``.
    """
    config = with_new_modules(inventory, config)
    _refuse_other_config(inventory, config)
    conversion = rooted_conversion(inventory, config)
    left = {*conversion.left, *left}
    resolution = resolve(inventory, config, was_trainable=conversion.was_trainable, given=indices or (), left=left)
    inventory.count_from_base_of(target.path for target in resolution.targets)
    conversion.left = {path for path, reason in resolution.skipped.items() if reason == FROZEN}
    along = find_trained_along(inventory, config, resolution, conversion.was_trainable)
    new_rows = find_new_rows(inventory, resolution)
    given = _given_columns(indices or {}, resolution.targets, inventory)
    fresh = [target for target in resolution.targets if not isinstance(target.module, PaCALayer)]
    _refuse_sharded(inventory, fresh)
    _refuse_other_columns(resolution.targets, given)
    by_data = config.selection in CALIBRATED or (config.selection == "quant_error" and weigh_errors)
    if by_data and not data_follows and any(target.path not in given for target in fresh):
        raise PaCAError(
            f"selection={config.selection!r} looks at data: pass calibration=, an iterable of batches "
            "(PaCAStrategy takes them from the training data by itself)."
        )
    if fresh and config.column_steps == "input_rms" and not data_follows:
        raise PaCAError(
            "column_steps='input_rms' looks at data: pass calibration=, an iterable of batches (PaCAStrategy takes "
            "them from the training data by itself)."
        )
    originals = {path: original_state(module) for path, module in resolution.saved.items() if not is_marked(module)}
    _freeze(inventory, conversion)
    remember_buffers(inventory, conversion)
    for target in fresh:
        _convert(target, conversion, given.get(target.path), by_data, inventory)
    layers = inventory.layers
    if quantize:
        quantize_layers(layers, config)
    for layer in layers.values():
        layer.paca_delta.requires_grad_(True)
    for path, module in resolution.saved.items():
        if path in originals:
            mark(module, originals[path])
        module.requires_grad_(True)
    for module, names in along.items():
        train_along(module, names)
    for embedding, head, ids in new_rows:
        train_rows(embedding, head, ids)
    beside = {id(module.get_parameter(name)) for module, names in along.items() for name in names}
    beside |= {id(module.paca_rows) for _, module in row_modules(inventory.root)}
    if beside:
        remember_thawed(inventory.root, beside)
    keep_plain_layout(inventory.paths)
    return report_on(inventory, config, resolution)


def _freeze(inventory: Inventory, conversion: Conversion) -> None:
    """Freeze what no conversion has seen yet: what the user thawed since the last one stays so."""
    for name, parameter in inventory.parameters.items():
        if name not in conversion.was_trainable and not name.endswith(NO_BASE):
            conversion.was_trainable[name] = parameter.requires_grad
            parameter.requires_grad_(False)


def _convert(target: Target, conversion: Conversion, given: Tensor | None, by_data: bool, inventory: Inventory) -> None:
    module, config = target.module, conversion.config
    by_weight = config.selection in BY_WEIGHT and not by_data
    chosen, pending = given, None
    if chosen is None and config.selection in BY_ERROR:
        refuse_quantized(module, config.selection, target.path)
    if chosen is None and by_weight and not module.weight.is_meta:
        scores = weight_scores(module, target.layer_class, config.selection, target.path)
        chosen = largest_indices(scores, target.r)
    elif chosen is None and (by_data or by_weight):
        pending = PendingSelection(config.selection, by_data)
    if chosen is None:
        name = inventory.relative(target.path)
        chosen = random_indices(in_features_of(module), target.r, seed=config.seed, path=name)
    with taken_back_on_error(module):
        target.layer_class.adopt(module, chosen, target.scaling)
    assert isinstance(module, PaCALayer)
    if config.steps_by_input:  # until data has fitted them, or a checkpoint brings them
        module.paca_scale = torch.ones(target.r, device=module.paca_indices.device)
    module.paca_pending, module.paca_conversion, module.paca_path = pending, conversion, target.path


def _given_columns(indices: Mapping[str, Tensor], targets: list[Target], inventory: Inventory) -> dict[str, Tensor]:
    """Given columns, checked, by the path of the target."""
    by_name = {inventory.relative(target.path): target for target in targets} | {t.path: t for t in targets}
    if unknown := sorted(set(indices) - set(by_name)):
        raise PaCAError(f"indices are given for {unknown[:3]}, which are not among the target layers.")
    for name, chosen in indices.items():
        check_indices(chosen, in_features_of(by_name[name].module), by_name[name].r, path=name)
    return {by_name[name].path: chosen.cpu() for name, chosen in indices.items()}


def _refuse_other_columns(targets: list[Target], columns: dict[str, Tensor]) -> None:
    for target in targets:
        chosen, layer = columns.get(target.path), target.module
        if chosen is not None and isinstance(layer, PaCALayer) and not torch.equal(chosen, layer.paca_indices.cpu()):
            raise PaCAError(
                f"indices: {target.path!r} was converted before and trains other columns. unload(model) first."
            )


def _refuse_other_config(inventory: Inventory, config: PaCAConfig) -> None:
    for before, path, _ in conversions_of(inventory.layers):
        if before.config != config:
            raise PaCAError(
                f"{path!r} was converted before with another configuration (different: "
                f"{before.config.differences(config)}). Convert once, or unload(model) first."
            )


def _refuse_sharded(inventory: Inventory, fresh: list[Target]) -> None:
    weights = {target.path: weight_of(target.module) for target in fresh}
    sharded = next((path for path, weight in weights.items() if weight is not None and is_sharded(weight)), None)
    if fresh and (where := sharded or inventory.fsdp1) is not None:
        raise PaCAError(
            f"{where!r} is sharded already. Call apply_paca before fully_shard, or leave both to strategy='paca_fsdp2'."
        )
