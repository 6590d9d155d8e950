"""The update of a layer's columns as adapters hold it: without the steps by which an optimizer moved them.

Steps are powers of two, so dividing by them and multiplying again changes no bit.
"""

from torch import Tensor

from paca_lightning.core.dtensor import whole_tensor
from paca_lightning.layers.base import PaCALayer


def whole_update(layer: PaCALayer) -> Tensor:
    """The update in units of the scaling, gathered, in host memory, shape (out_features, r)."""
    delta = whole_tensor(layer.paca_delta)
    return delta if layer.paca_scale is None else delta * whole_tensor(layer.paca_scale)


def in_own_steps(update: Tensor, layer: PaCALayer) -> Tensor:
    """An adapter's update as a layer's delta, shape (out_features, r)."""
    return update if layer.paca_scale is None else update / whole_tensor(layer.paca_scale)
