"""Going back: to the base model for a while or for good, and to plain layers with the trained columns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from paca_lightning.conversion.changed_state import changed_state, overwrite
from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.saved_modules import (
    load_local_state,
    local_state,
    restore_original,
    saved_modules,
    unmark,
)
from paca_lightning.conversion.state import ADAPTERS, conversions_in, conversions_of, root_names
from paca_lightning.core.dtensor import is_sharded, local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import declare_new_tokens
from paca_lightning.core.paths import clean_path
from paca_lightning.core.private.torch import preserve_versions, version_of
from paca_lightning.layers.along import along_names, end_all_along, end_along
from paca_lightning.layers.base import PaCALayer, paca_layers
from paca_lightning.layers.columns import check_not_parametrized
from paca_lightning.layers.linear4bit import is_quantized_linear4bit
from paca_lightning.layers.rows import TrainedRows, release_all_rows, row_modules, write_all_rows


@contextmanager
def disable_paca(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is the base model, bitwise, and trains nothing of PaCA.

    A forward before the context may have its backward after it, as in preference tuning (DPO) with the base model as
    the reference: dense weights come back bitwise, and autograd is told that they never changed. Modules that are
    trained whole, thawed parameters, and deltas that change inside, count as changed. A forward inside must have its
    backward inside: better, run it under ``torch.no_grad``.
    """
    layers = [layer for _, layer in paca_layers(model) if layer.paca_enabled]
    tuned = [(path, module, local_state(module)) for path, module in saved_modules(model)]
    changed = [(tensor, original, local(tensor).detach().clone()) for tensor, original in changed_state(model).values()]
    with torch.no_grad():
        deltas = [local(layer.paca_delta) for layer in layers]
        weights = tuple(local(layer.base) for layer in layers)
        weights += tuple(local(module.weight) for _, module in row_modules(model))
    versions = [version_of(delta) for delta in deltas]
    with preserve_versions(weights):
        try:
            for layer in layers:
                layer.restore_columns()
                layer.paca_enabled = False
            for path, module, _ in tuned:
                restore_original(module, path)
            for tensor, original, _ in changed:
                overwrite(tensor, original)
            write_all_rows(model)
            yield
        finally:
            for layer in layers:
                layer.paca_enabled = True
                layer.write_columns()
            for _, module, state in tuned:
                load_local_state(module, state)
            for tensor, _, trained in changed:
                overwrite(tensor, trained)
            write_all_rows(model)
    if [version_of(delta) for delta in deltas] != versions:
        for layer in layers:
            layer.write_columns()  # another weight than before: once more, so that autograd sees it


def merge(model: nn.Module) -> nn.Module:
    """Turn PaCA layers into plain linear layers that hold the trained columns; returns the model.

    Of several adapters loaded by name it takes the active one. The others are forgotten: their base model is gone.

    Raises:
        PaCAError: If the model is sharded, or inside ``disable_paca``, or a layer was parametrized since.
    """
    layers = releasable_layers(model, "merge")
    end_all_along(model)
    release_all_rows(model)
    for layer in layers:
        layer.release(trained=True)
    for _, module in saved_modules(model):
        unmark(module)
    for module in model.modules():
        vars(module).pop(ADAPTERS, None)
        declare_new_tokens(module, None)  # another training finds them in the vocabulary
    return model


def unload(model: nn.Module) -> nn.Module:
    """Turn PaCA layers into plain linear layers with the base weight, bitwise; returns the model.

    Modules trained whole, thawed parameters and running statistics are as before the conversion, too. Every parameter
    requires a gradient again if it did then.

    Raises:
        PaCAError: If the model is sharded, or inside ``disable_paca``, or a module that is trained whole was converted
            on the meta device.
    """
    layers = releasable_layers(model, "unload")
    for path, module in saved_modules(model):
        restore_original(module, path)
        unmark(module)
    for tensor, original in changed_state(model).values():
        overwrite(tensor, original)
    end_all_along(model)
    release_all_rows(model)
    to_root, found = root_names(model), conversions_in(model)
    for layer in layers:
        layer.release(trained=False)
    for conversion, _, _ in found:
        if conversion.room is not None:
            conversion.room.take_back()
    was_trainable = {name: flag for conversion, _, _ in found for name, flag in conversion.was_trainable.items()}
    for name, parameter in model.named_parameters():
        flag = was_trainable.get(to_root(clean_path(name)) or "")
        if flag is not None and flag != parameter.requires_grad and parameter.is_floating_point():
            parameter.requires_grad_(flag)
    return model


@contextmanager
def undone_on_error(inventory: Inventory) -> Iterator[None]:
    """If the block fails, release the layers that it converted, and freeze and thaw parameters as they were.

    Quantized layers of bitsandbytes get their attributes back; a release would make dense layers of them.
    """
    give_back = [_as_it_is(module) for module in inventory.paths if is_quantized_linear4bit(module)]
    layers, saved = inventory.layers, inventory.saved
    states = {path: (layer.paca_conversion, layer.paca_path) for path, layer in layers.items()}
    seen = [(each, dict(each.was_trainable), each.left) for each, _, _ in conversions_of(layers)]
    along = {module for module in inventory.paths if along_names(module)}
    rows = {module for module in inventory.paths if isinstance(module, TrainedRows)}
    flags = [(parameter, parameter.requires_grad) for parameter in inventory.parameters.values()]
    try:
        yield
    except BaseException:  # also Ctrl-C, in a calibration that takes long
        for module in inventory.paths:
            if along_names(module) and module not in along:
                end_along(module)
            if isinstance(module, TrainedRows) and module not in rows:
                module.release()
        for each in give_back:
            each()
        for path, layer in inventory.layers.items():
            if path in states:
                layer.paca_conversion, layer.paca_path = states[path]
            else:
                layer.release(trained=False)
        for conversion, was_trainable, left in seen:
            conversion.was_trainable, conversion.left = was_trainable, left
        for path, module in inventory.saved.items():
            if path not in saved:
                unmark(module)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        raise


@contextmanager
def taken_back_on_error(module: nn.Module) -> Iterator[None]:
    """If the block fails, such as for want of memory, give a module its class and its attributes back."""
    give_back = _as_it_is(module)
    try:
        yield
    except BaseException:
        give_back()
        raise


def _as_it_is(module: nn.Module) -> Callable[[], None]:
    """What gives a module its present class and attributes back; tensors are kept, and not copied."""
    base_class, attributes = type(module), dict(vars(module))
    tables = [(table, dict(table)) for table in attributes.values() if isinstance(table, dict)]

    def give_back() -> None:
        module.__class__ = base_class
        vars(module).clear()
        vars(module).update(attributes)
        for table, content in tables:  # the same dicts: handles of hooks refer to them
            table.clear()
            table.update(content)

    return give_back


def releasable_layers(model: nn.Module, action: str) -> list[PaCALayer]:
    """The PaCA layers of a model.

    Args:
        model: Any module.
        action: What turns them into plain layers, for messages.

    Raises:
        PaCAError: If they cannot be turned into plain layers now.
    """
    layers = list(paca_layers(model))
    for path, layer in layers:
        if not layer.paca_enabled:
            raise PaCAError(f"{action} does not work inside disable_paca: leave that context first.")
        check_not_parametrized(layer, layer.base, path)
        if is_sharded(layer.base):
            raise PaCAError(
                f"{action}: {path!r} is sharded by FSDP2, which still counts on its delta. Write the result with "
                "export_merged(model, directory) or save_adapter(model, directory), on every rank, and load that "
                "into an unsharded model."
            )
    return [layer for _, layer in layers]
