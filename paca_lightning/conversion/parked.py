"""An adapter that is out of use: what it trained, taken out of a model that is then its base model, and put back."""

from dataclasses import dataclass

from torch import Tensor, nn

from paca_lightning.conversion.changed_state import changed_state, overwrite
from paca_lightning.conversion.revert import releasable_layers, unload
from paca_lightning.conversion.saved_modules import ORIGINAL, load_local_state, local_state, mark, saved_modules
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path
from paca_lightning.layers.along import along_names, train_along
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.parked import ParkedColumns
from paca_lightning.layers.rows import row_modules


@dataclass(frozen=True)
class ParkedAdapter:
    """What a converted model has beyond its base model.

    Attributes:
        columns: Of each PaCA layer.
        saved: The modules that are trained whole, with their original state and their trained one.
        along: The modules of which parameters are trained along, with the names of these.
        changed: What else had changed, by name in the model.
        flags: Whether each parameter required a gradient.
    """

    columns: list[ParkedColumns]
    saved: list[tuple[nn.Module, dict[str, Tensor] | None, dict[str, Tensor]]]
    along: list[tuple[nn.Module, tuple[str, ...]]]
    changed: dict[str, Tensor]
    flags: list[tuple[nn.Parameter, bool]]


def park(model: nn.Module, action: str) -> ParkedAdapter:
    """Make a converted model its base model, as ``unload`` does, and keep what that takes away.

    Args:
        model: The converted model.
        action: Of the user, for messages.

    Raises:
        PaCAError: As for ``unload``, or if the adapter has rows of new tokens. The model is then as it was.
    """
    if any(row_modules(model)):
        raise PaCAError(
            f"{action}: an adapter with new tokens cannot wait beside others. Load it alone, without a name."
        )
    parked = ParkedAdapter(
        columns=[ParkedColumns.of(layer) for layer in releasable_layers(model, action)],
        saved=[(module, vars(module)[ORIGINAL], local_state(module)) for _, module in saved_modules(model)],
        along=[(module, names) for module in model.modules() if (names := along_names(module))],
        changed={name: tensor.detach().clone() for name, (tensor, _) in changed_state(model).items()},
        flags=_flags(model),
    )
    unload(model)
    return parked


def put_back(model: nn.Module, parked: ParkedAdapter) -> None:
    """Make a base model the converted model that it was, bitwise.

    Args:
        model: That ``park`` was called with.
        parked: What it returned.

    Raises:
        PaCAError: If the base weights have changed since. The model is then as it was.
    """
    done: list[PaCALayer] = []
    flags = _flags(model)
    try:
        for columns in parked.columns:
            columns.put_back()
            assert isinstance(columns.module, PaCALayer)
            done.append(columns.module)
    except PaCAError:
        for layer in done:
            layer.release(trained=False)
        _set_flags(flags)
        raise
    for module, names in parked.along:
        train_along(module, names)
    for module, original, trained in parked.saved:
        mark(module, original)
        load_local_state(module, trained)
    if parked.changed:
        tensors = {clean_path(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        for name, value in parked.changed.items():
            overwrite(tensors[name], value)
    _set_flags(parked.flags)


def _flags(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _set_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)
