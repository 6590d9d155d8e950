"""Writing the trained columns back into the weights, after each optimizer step."""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paca_lightning.conversion.along_rates import set_along_rates
from paca_lightning.conversion.changed_state import remember_thawed
from paca_lightning.conversion.heads import names_to_save
from paca_lightning.conversion.inventory import Inventory, take_inventory
from paca_lightning.conversion.optimizers import (
    ClosureFollower,
    follow_moves,
    optimizers_within,
    warn_of_small_steps,
)
from paca_lightning.core.dtensor import is_first_rank, is_sharded, local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path
from paca_lightning.layers.base import PaCALayer, paca_layers
from paca_lightning.layers.columns import check_not_parametrized
from paca_lightning.layers.fused_write import ColumnWriter
from paca_lightning.layers.rows import TrainedRows, row_modules, write_all_rows


def write_columns(model: nn.Module) -> None:
    """Bring every PaCA weight in a model up to date with its delta, and embeddings with the rows of new tokens."""
    for _, layer in paca_layers(model):
        layer.write_columns()
    write_all_rows(model)


def layers_stepped_by(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, PaCALayer]:
    """The PaCA layers of a model, by path, whose delta is in an optimizer."""
    owned = {id(parameter) for parameter in _parameters(optimizer)}
    return {path: layer for path, layer in paca_layers(model) if id(layer.paca_delta) in owned}


def rows_stepped_by(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, TrainedRows]:
    """The embeddings and heads of a model, by path, whose trained rows are in an optimizer."""
    owned = {id(parameter) for parameter in _parameters(optimizer)}
    return {path: module for path, module in row_modules(model) if id(module.paca_rows) in owned}


def attach(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Write the trained columns back after each step of an optimizer: for Fabric and plain PyTorch loops.

    Columns are also written where an optimizer moves parameters elsewhere: before each evaluation of a step's closure
    (LBFGS, SAM), and after ``first_step``, ``second_step`` (SAM), ``train`` and ``eval`` (schedule-free optimizers).
    Norms and biases that are trained along get a parameter group of their own if ``norms_lr`` or the optimizer's weight
    decay asks for it: attach before a schedule is built, and before a saved state is loaded into the optimizer.

    Args:
        optimizer: Has some or all of the model's deltas. One that wraps PyTorch's as ``optimizer`` (Lightning's,
            Fabric's, Accelerate's, Lookahead) is followed inside.
        model: The converted model.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        PaCAError: If the optimizer has none of the model's deltas, or takes no step hooks; if columns were never
            chosen, or a weight is not sharded by rows; if the optimizer cannot have the group that ``norms_lr`` needs.
            On a later step, if the model was merged or unloaded since.
    """
    optimizers = optimizers_within(optimizer)
    layers, rows = layers_stepped_by(optimizers[0], model), rows_stepped_by(optimizers[0], model)
    if not layers and not rows:
        raise PaCAError(
            f"{type(optimizers[0]).__name__} has none of the model's paca_delta parameters, so nothing would be "
            "trained. Build it after apply_paca."
        )
    inventory = take_inventory(model)
    _check_layers(model, layers, inventory)
    set_along_rates(optimizer, model)
    warn_of_small_steps(optimizers[0], {id(layer.paca_delta) for layer in layers.values()})
    _warn_of_frozen_heads(inventory, {id(p) for p in _parameters(optimizers[0]) if p.requires_grad})
    handles = [optimizers[0].register_step_pre_hook(_ThawedParameters(optimizers[0], model))]
    write_back = _WriteBack(layers, rows)
    for each in optimizers:
        handles.append(each.register_step_pre_hook(ClosureFollower(write_back.deltas, write_back.write)))
        handles.append(each.register_step_post_hook(write_back))
        handles.append(follow_moves(each, write_back.write))
    return _Handles(*handles)


class _Handles(RemovableHandle):
    """Several handles as one."""

    def __init__(self, *handles: RemovableHandle) -> None:
        super().__init__(OrderedDict())  # a handle keeps a weak reference, which a dict does not take
        self._handles = handles

    def remove(self) -> None:
        """Remove all their hooks."""
        for handle in self._handles:
            handle.remove()


class _WriteBack:
    """A hook behind each step that writes the columns of an optimizer's layers back."""

    def __init__(self, layers: dict[str, PaCALayer], rows: dict[str, TrainedRows]) -> None:
        self._layers, self._rows, self._first = layers, rows, True
        self._writer = ColumnWriter(list(layers.values()))

    def __call__(self, *_: Any) -> None:
        self.write()
        if self._first:  # after the write, every delta is this rank's own, which has the gradient
            self._first = False
            _warn_of_idle([clean_path(path) for path, layer in self._layers.items() if layer.paca_delta.grad is None])

    def write(self) -> None:
        """Write the columns and the rows now."""
        for path, layer in (self._layers | self._rows).items():
            if not isinstance(layer, PaCALayer | TrainedRows):
                raise PaCAError(
                    f"{path!r} is a plain layer again (merge or unload), and the optimizer still trains its delta. "
                    "Remove the handle that attach() returned, or build a new optimizer."
                )
        self._writer.write()
        for module in self._rows.values():
            module.write_rows()

    def deltas(self) -> Sequence[Tensor]:
        """This rank's part of the deltas, and of the trained rows."""
        deltas = [local(layer.paca_delta) for layer in self._layers.values() if isinstance(layer, PaCALayer)]
        return deltas + [local(m.paca_rows) for m in self._rows.values() if isinstance(m, TrainedRows)]


class _ThawedParameters:
    """A hook before each step that notes parameters which are trained beside the deltas, and what they were.

    A run may thaw some for a while and freeze them again. They belong to checkpoints and adapters from then on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._model = model
        self._known = {id(parameter) for parameter in _parameters(optimizer) if parameter.requires_grad}
        self._count = 0
        self._others: list[nn.Parameter] = []
        _refuse_thawed_weights(model, self._known)
        remember_thawed(model, self._known)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if count != self._count:
            self._count = count
            self._others = [parameter for parameter in _parameters(optimizer) if id(parameter) not in self._known]
        # A closure computes the gradients after this, so that they cannot tell.
        if thawed := {id(parameter) for parameter in self._others if parameter.requires_grad}:
            self._known |= thawed
            self._count = 0  # look at the others again
            _refuse_thawed_weights(self._model, thawed)
            remember_thawed(self._model, thawed)


def _refuse_thawed_weights(model: nn.Module, trained: set[int]) -> None:
    """Raise if what a PaCA layer keeps frozen is trained: of the weight, columns would be trained twice."""
    for path, layer in paca_layers(model):
        for name in (layer.base_name, "paca_base_columns"):
            if id(getattr(layer, name)) in trained:
                raise PaCAError(
                    f"'{path}.{name}' was thawed after the conversion and is in the optimizer. PaCA trains the layer "
                    "by its paca_delta and keeps its weight frozen. Thaw other parameters, or leave the layer out: "
                    f"PaCAConfig(exclude_modules=[{path.rpartition('.')[2]!r}])."
                )
    for path, module in row_modules(model):
        if id(module.weight) in trained:
            raise PaCAError(
                f"'{path}.weight' was thawed after the conversion, which trains the rows of new tokens in it. Train it "
                "whole instead: new_tokens_train: all."
            )


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _check_layers(model: nn.Module, layers: dict[str, PaCALayer], inventory: Inventory) -> None:
    waiting = [
        path for path, layer in paca_layers(model) if layer.paca_pending is not None and not layer.paca_pending.by_data
    ]
    if waiting:
        raise PaCAError(
            f"The columns of {waiting[0]!r} ({len(waiting)} such layers) were to be chosen by its weight, which was on "
            "the meta device at its conversion. Let FSDP2Strategy stream the weights, convert after loading them, or "
            "use selection='random'."
        )
    for path, layer in layers.items():
        check_not_parametrized(layer, layer.base, path)
        placements: tuple[Any, ...] = getattr(layer.base, "placements", ())
        if any(not (placement.is_shard(0) or placement.is_replicate()) for placement in placements):
            raise PaCAError(
                f"{path!r} is split by columns (tensor parallelism), which PaCA does not support: the delta is split "
                "by rows. Leave the layer whole, or shard it with fully_shard."
            )
    for path, layer in inventory.layers.items():
        own_name = layer.base_path(path)
        owners = inventory.owners[layer.base]  # type: ignore[index]
        if others := [name for name in owners if name != own_name]:
            raise PaCAError(
                f"{own_name!r} shares its memory with {others[0]!r} since the conversion: columns written into one "
                "would change the other. Tie weights before the conversion, which leaves them frozen."
            )


def _warn_of_frozen_heads(inventory: Inventory, trained: set[int]) -> None:
    """Name heads over classes of which nothing is trained: a new one stays random."""
    frozen = {
        head
        for head in inventory.heads.over_classes
        if not isinstance(head, PaCALayer) and not any(id(parameter) in trained for parameter in head.parameters())
    }
    if not frozen or not is_first_rank():
        return
    modules = {paths[0]: module for module, paths in inventory.paths.items()}
    names = [inventory.relative(path) for path in names_to_save(modules, frozen)]
    zero = ", and zero, so that no layer before it gets a gradient" if any(map(_is_zero, frozen)) else ""
    warnings.warn(
        f"The output head {', '.join(map(repr, names))} is frozen{zero}. If it is new for this task, train it whole: "
        f"PaCAConfig(modules_to_save={names!r}).",
        stacklevel=3,
    )


def _is_zero(head: nn.Module) -> bool:
    weight = dict(head.named_parameters()).get("weight")
    return weight is not None and not weight.is_meta and not is_sharded(weight) and not bool(weight.any())


def _warn_of_idle(paths: list[str]) -> None:
    """Name the layers that the first step left alone."""
    if paths and is_first_rank():
        warnings.warn(
            f"{len(paths)} PaCA layers had no gradient in the first step ({paths[0]!r} is one). Experts that saw no "
            "token are like that; a layer whose weight the model reads without calling it never trains: list it in "
            f"exclude_modules={sorted({path.rpartition('.')[2] for path in paths})!r}.",
            stacklevel=2,
        )
