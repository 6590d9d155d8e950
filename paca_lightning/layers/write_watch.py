"""Detecting a delta that was changed but not written back, so that the weight would not learn.

An optimizer without an attached write-back moves deltas and leaves the weights: the loss stands still, and a saved
adapter was never evaluated. So each layer remembers which delta it last wrote, and its version. PyTorch's version
counter grows with every change in place, except those by fused optimizers. For these, hooks around every optimizer's
step count the steps and mark the layers whose deltas a step has moved without a write-back.
"""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from paca_lightning.core.dtensor import is_sharded
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import version_of
from paca_lightning.layers.columns import trained_columns


class WatchedLayer(Protocol):
    """What this module knows of a PaCA layer."""

    paca_delta: nn.Parameter
    paca_base_columns: nn.Parameter
    paca_path: str
    paca_written: tuple[int, int] | None
    paca_written_at: int

    @property
    def factor(self) -> float | Tensor:
        """What the delta is multiplied by in the weight."""

    def _read_columns(self) -> Tensor: ...


MOVED = (0, -1)
"""Value of ``paca_written`` after an optimizer has moved the delta."""

watched: dict[int, "weakref.ref[WatchedLayer]"] = {}
"""The layers whose deltas an optimizer's step may move, by the id of the delta."""

_steps = 0
_hooked = False


def is_written(layer: WatchedLayer, delta: Tensor) -> bool:
    """Whether a layer's weight is known to be in step with its delta."""
    return layer.paca_written == (id(delta), version_of(delta))


def note_written(layer: WatchedLayer, delta: Tensor) -> None:
    """Note that a layer's weight is in step with its delta now."""
    global _hooked
    if is_sharded(delta):  # a forward sees another parameter, the gathered one
        layer.paca_written = None
        return
    layer.paca_written, layer.paca_written_at = (id(delta), version_of(delta)), _steps
    if id(delta) not in watched or watched[id(delta)]() is not layer:
        key = id(delta)
        watched[key] = weakref.ref(layer, lambda _: watched.pop(key, None))
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_count_step)
        register_optimizer_step_post_hook(_mark_moved)


def check_written(layer: WatchedLayer, delta: Tensor) -> None:
    """Raise if a delta was changed and not written back since.

    Raises:
        PaCAError: If so.
    """
    unknown = layer.paca_written is None  # a copy, or gathered by FSDP2
    # Only values can tell what else moves the counter (DDP broadcasts weights and deltas alike), and whether another
    # parameter in the delta's place has a weight that fits.
    if unknown or _weight_is_in_step(layer):
        note_written(layer, delta)
        return
    raise PaCAError(
        f"The delta of {_name(layer)} has moved since its weight was written, so the weight would not learn. Call "
        "attach(optimizer, model) before training: PaCAStrategy does it in Lightning, PaCATrainerCallback in Hugging "
        "Face's Trainer. After a change of your own, or after an optimizer swaps its parameters, call "
        "write_columns(model)."
    )


@torch.no_grad()
def _weight_is_in_step(layer: WatchedLayer) -> bool:
    """Whether the weight equals its base columns plus its scaled delta. Waits for the device."""
    columns = trained_columns(layer.paca_base_columns, layer.paca_delta, layer.factor)
    present = layer._read_columns()
    return torch.equal(present, columns.to(present.dtype))


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


def _mark_moved(optimizer: Optimizer, *_: Any) -> None:
    """Run behind a step and behind the optimizer's own hooks, among which is the write-back if it is attached."""
    if not watched:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reference = watched.get(id(parameter))
            layer = None if reference is None else reference()
            if layer is None or vars(layer).get("paca_written") is None:  # merged or unloaded since
                continue
            if layer.paca_delta is parameter and layer.paca_written_at != _steps and parameter.grad is not None:
                layer.paca_written = MOVED


def _name(layer: WatchedLayer) -> str:
    return repr(layer.paca_path) if layer.paca_path else type(layer).__name__
