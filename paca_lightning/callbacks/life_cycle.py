"""The life cycle of a conversion in a run: converted, filled by an adapter, its columns chosen, ready to evaluate."""

from dataclasses import replace

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision
from torch import nn
from torch.utils.hooks import RemovableHandle

from paca_lightning.adapters.adapter import load_adapter
from paca_lightning.adapters.new_tokens import check_run_has
from paca_lightning.adapters.saved import adapter_layers, saved_config, saved_settings
from paca_lightning.adapters.state_dict import keep_everything, keep_trained_state
from paca_lightning.callbacks.averaging import check_bases
from paca_lightning.callbacks.column_selection import select_on_training_data
from paca_lightning.callbacks.resumed_rates import schedules_of
from paca_lightning.callbacks.run_checks import check_trained_layers
from paca_lightning.conversion.along_rates import set_along_rates
from paca_lightning.conversion.convert import convert
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.conversion.revert import undone_on_error
from paca_lightning.conversion.select import has_own_steps, quantize_layers, settle_columns, waits_for_data
from paca_lightning.conversion.state import Conversion, conversion_of
from paca_lightning.conversion.write_back import attach, layers_stepped_by, rows_stepped_by
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer, paca_layers

FROM_ADAPTER = ("r", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Settings that an adapter decides, beside its alpha: another value given with it is a contradiction."""


def config_beside_adapter(config: PaCAConfig | None, adapter: str | None) -> PaCAConfig:
    """The settings of a run that may start from an adapter: the given ones, the adapter's, or the defaults.

    Raises:
        PaCAError: If the adapter is damaged, or the given settings contradict it.
    """
    if adapter is None:
        return config or PaCAConfig()
    trained = saved_config(adapter)
    if config is None:
        return trained
    if not config.modules_to_save:  # a run adds new heads by itself, and an adapter lists them
        config = replace(config, modules_to_save=trained.modules_to_save)
    given = {name: getattr(config, name) for name in FROM_ADAPTER} | {"alpha": config.alpha_of(None, config.r)}
    theirs = {name: getattr(trained, name) for name in FROM_ADAPTER} | {"alpha": trained.alpha_of(None, trained.r)}
    for name, value in given.items():
        if value != theirs[name]:
            raise PaCAError(
                f"config says {name}={value!r}, and the adapter {adapter!r} was trained with {name}={theirs[name]!r}. "
                "Leave config out to take the adapter's settings."
            )
    return config


def convert_module(
    trainer: Trainer, pl_module: LightningModule, config: PaCAConfig, adapter: str | None
) -> ConversionReport:
    """Convert a module, or take a converted one. Columns that data chooses have to wait for the training batches.

    Args:
        trainer: Of the run.
        pl_module: With its model built, perhaps on the meta device.
        config: The settings.
        adapter: The adapter to start from.

    Raises:
        PaCAError: If the module cannot be converted, or not beside an averaging callback.
    """
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        # It would replace PaCA layers later: let it quantize first, and convert what it leaves.
        trainer.precision_plugin.convert_module(pl_module)
    if adapter is not None and (settings := saved_settings(adapter)) is not None and settings.new_tokens is not None:
        check_run_has(pl_module, settings.new_tokens, adapter)
    report = convert_beside_adapter(pl_module, config, adapter, data_follows=True)
    check_bases(trainer, pl_module)
    return report


def convert_beside_adapter(
    model: nn.Module, config: PaCAConfig, adapter: str | None, *, data_follows: bool
) -> ConversionReport:
    """Convert a model, to the columns of the adapter that is loaded after it if there is one.

    Args:
        model: Fresh, or converted before.
        config: The settings.
        adapter: The adapter to start from.
        data_follows: Whether batches will choose columns, where the settings leave that to data.

    Raises:
        PaCAError: If it cannot be converted.
    """
    inventory = take_inventory(model)
    # Read before the conversion: a layer that is quantized on the way forgets what other columns started from.
    indices, left = adapter_layers(adapter) if adapter is not None and not inventory.layers else (None, [])
    with undone_on_error(inventory):
        return convert(inventory, config, indices, data_follows=data_follows or adapter is not None, left=left)


def keep_state(pl_module: LightningModule, full_checkpoints: bool) -> None:
    """Let checkpoints keep what is trained, or everything."""
    if full_checkpoints:
        keep_everything(pl_module)
    else:
        keep_trained_state(pl_module)


def load_waiting_adapter(pl_module: LightningModule, adapter: str | None) -> None:
    """Load the adapter to start from, once into a module, and as soon as its weights are there."""
    on_meta = any(layer.base.is_meta for _, layer in paca_layers(pl_module))
    conversion = present_conversion(pl_module)
    if adapter is not None and not on_meta and conversion.adapter != adapter:
        load_adapter(pl_module, adapter)
        conversion.adapter = adapter


def choose_columns(trainer: Trainer, pl_module: LightningModule, config: PaCAConfig) -> bool:
    """Choose the columns that wait for data by the first training batches; whether there were any.

    Raises:
        PaCAError: If the batches cannot decide.
    """
    waiting, layers = _waiting(pl_module), dict(paca_layers(pl_module))
    restored = present_conversion(pl_module).columns_restored
    fitted = not config.steps_by_input or restored or any(map(has_own_steps, layers.values()))
    if not waiting and fitted:
        return False
    if restored:
        # The columns came with the checkpoint, before the weights were cast. When chosen, they were read after.
        for layer in waiting:
            settle_columns(layer)
        quantize_layers(layers, config)
    else:
        select_on_training_data(trainer, pl_module, layers, config)
    return True


def settle_restored_columns(pl_module: LightningModule, config: PaCAConfig) -> bool:
    """Take the columns that a checkpoint brought, to evaluate without training batches; whether any had waited.

    Raises:
        PaCAError: If the columns of a base that is to be quantized are not chosen yet.
    """
    if not (waiting := _waiting(pl_module)):
        return False
    if present_conversion(pl_module).columns_restored:
        for layer in waiting:
            layer.paca_pending = None
        with torch.inference_mode(False):  # as Lightning evaluates, weights could never be trained again
            quantize_layers(dict(paca_layers(pl_module)), config)
        return True
    if config.quantize is not None:
        raise PaCAError(
            f"selection={config.selection!r} chooses the columns by training data before the model is quantized, so "
            "there is nothing to evaluate yet. Give a checkpoint or an adapter."
        )
    return False


def present_conversion(model: nn.Module) -> Conversion:
    """The conversion of a model that was converted."""
    conversion = conversion_of(model)
    assert conversion is not None
    return conversion


def _waiting(pl_module: LightningModule) -> list[PaCALayer]:
    """The layers whose columns data has yet to choose."""
    return [layer for _, layer in paca_layers(pl_module) if waits_for_data(layer)]


def attach_optimizers(trainer: Trainer, pl_module: LightningModule) -> list[RemovableHandle]:
    """Attach the write-back to the run's optimizers, and give what is trained along its learning rate.

    Returns:
        What removes the write-back.

    Raises:
        PaCAError: If an optimizer leaves something out, or cannot train it so.
    """
    check_trained_layers(trainer, pl_module)
    for optimizer in trainer.optimizers:
        set_along_rates(optimizer, pl_module, schedules_of(optimizer, trainer))
    stepped = (o for o in trainer.optimizers if layers_stepped_by(o, pl_module) or rows_stepped_by(o, pl_module))
    return [attach(each, pl_module) for each in stepped]
