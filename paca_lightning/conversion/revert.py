"""Going back: to the base model for a while or for good, and to plain layers with the trained columns."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from paca_lightning.conversion.saved_modules import (
    load_local_state,
    local_state,
    restore_original,
    saved_modules,
    unmark,
)
from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer, paca_layers


@contextmanager
def disable_paca(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is the base model, bitwise, and trains nothing of PaCA.

    A forward before it may be followed by its backward after it, as in preference tuning (DPO) with the base model as
    the reference: dense weights come back bitwise, and autograd is told that they never changed. Modules that are
    trained whole, and deltas that change inside, it treats as changed. A forward inside must have its backward inside,
    too: better, run it under ``torch.no_grad``.
    """
    layers = [layer for _, layer in paca_layers(model) if layer.paca_enabled]
    tuned = [(path, module, local_state(module)) for path, module in saved_modules(model)]
    with torch.no_grad():
        deltas = [local(layer.paca_delta) for layer in layers]
        weights = tuple(local(layer.base) for layer in layers)
    versions = [delta._version for delta in deltas]
    with _unsafe_preserve_version_counter(weights):
        for layer in layers:
            layer.restore_columns()
            layer.paca_enabled = False
        try:
            for path, module, _ in tuned:
                restore_original(module, path)
            yield
        finally:
            for layer in layers:
                layer.paca_enabled = True
                layer.write_columns()
            for _, module, state in tuned:
                load_local_state(module, state)
    if [delta._version for delta in deltas] != versions:
        for layer in layers:
            layer.write_columns()  # another weight than before: once more, so that autograd sees it


def merge(model: nn.Module) -> nn.Module:
    """Turn PaCA layers into plain linear layers that hold the trained columns; returns the model."""
    _check_enabled(model)
    release((layer for _, layer in list(paca_layers(model))), trained=True)
    for _, module in saved_modules(model):
        unmark(module)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Turn PaCA layers into plain linear layers with the base weight, bitwise; returns the model."""
    _check_enabled(model)
    for path, module in saved_modules(model):
        restore_original(module, path)
        unmark(module)
    release((layer for _, layer in list(paca_layers(model))), trained=False)
    return model


def release(layers: Iterable[PaCALayer], *, trained: bool) -> None:
    """Turn layers back into what they were made from, with their trained or their base columns."""
    for layer in layers:
        vars(layer).pop("_paca_config", None)
        layer.release(trained=trained)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the block fails, release the layers that it converted, and freeze and thaw parameters as they were."""
    layers = {layer for _, layer in paca_layers(model)}
    saved = {module for _, module in saved_modules(model)}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except Exception:
        release([layer for _, layer in paca_layers(model) if layer not in layers], trained=False)
        for _, module in saved_modules(model):
            if module not in saved:
                unmark(module)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        raise


def _check_enabled(model: nn.Module) -> None:
    if any(not layer.paca_enabled for _, layer in paca_layers(model)):
        raise PaCAError("merge and unload do not work inside disable_paca: leave that context first.")
