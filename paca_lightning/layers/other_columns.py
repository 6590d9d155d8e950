"""The base columns of a layer at other indices, without moving to them: what a check may read."""

import torch
from torch import Tensor

from paca_lightning.core.dtensor import local, sharded_like
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.nf4_linear import QPaCALinear


@torch.no_grad()
def base_columns_at(layer: PaCALayer, indices: Tensor) -> Tensor:
    """What a layer's base columns would be after ``move_to_columns``, shape (out_features, r). Nothing changes.

    Args:
        layer: Any PaCA layer, which may be sharded.
        indices: Columns, shape (r,), on the layer's device.

    Raises:
        PaCAError: If the layer cannot train these columns, as ``move_to_columns`` would say.
    """
    if torch.equal(indices, layer.paca_indices):
        return layer.paca_base_columns
    if isinstance(layer, QPaCALinear):
        layer.check_movable()
    columns = layer._read_columns(indices)
    if layer.keeps_weight:  # which holds the trained values of the present columns
        where = (indices[:, None] == layer.paca_indices[None, :]).nonzero()
        own = local(layer.paca_base_columns).index_select(-1, where[:, 1])
        columns.index_copy_(-1, where[:, 0], own.to(columns.dtype))
    return sharded_like(columns, layer.paca_base_columns, layer.paca_base_columns.shape)
