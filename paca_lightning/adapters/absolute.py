"""The update that makes the columns of an adapter by PaCA's authors, whose file holds columns instead of updates."""

from collections.abc import Mapping

import torch
from torch import Tensor

from paca_lightning.adapters.tensors import AdapterTensors
from paca_lightning.core.dtensor import whole_tensor
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.other_columns import base_columns_at


@torch.no_grad()
def updates_of(layers: Mapping[str, PaCALayer], tensors: AdapterTensors) -> dict[str, Tensor]:
    """The updates, in units of the scaling, that turn base columns into the columns of an adapter, by layer path.

    The fork's merged weight has the columns ``s * P`` for its ``paca_w``, P, with P cast to the weight's dtype first.
    The update is ``(s P - C) / s`` in float64, rounded to fp32, so that ``C + s D`` is that column up to the rounding
    of fp32: the same bits in bf16 and fp16. It is collective for a sharded model.

    Args:
        layers: By path.
        tensors: Whose ``deltas`` hold P, shape (out_features, r).

    Raises:
        PaCAError: If a layer stores its weight transposed: there the fork takes columns of that matrix.
    """
    updates = {}
    for path, layer in layers.items():
        if layer.paca_base_class.__name__ == "Conv1D":
            raise PaCAError(
                f"{path!r} is a Conv1D, and the fork of PaCA's authors trains outputs of such a layer, not inputs. "
                "Merge the adapter there (merge_and_unload), and use the merged model."
            )
        base = whole_tensor(base_columns_at(layer, tensors.indices[path].to(layer.paca_indices.device)))
        dtype = layer.base.dtype if layer.keeps_weight else base.dtype
        columns = layer.scaling * tensors.deltas[path].to(base.device, dtype)
        updates[path] = ((columns.double() - base.double()) / layer.scaling).float()
    return updates
