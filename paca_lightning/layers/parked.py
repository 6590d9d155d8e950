"""Trained columns that are out of use: kept beside the model while their layer is a plain one, and put back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import PendingSelection


@dataclass(frozen=True)
class ParkedColumns:
    """The columns of one layer. Delta and base columns are the layer's own parameters, which an optimizer may hold.

    Attributes:
        module: The layer.
        layer_class: Its class with the columns in use.
        delta: Shape (out_features, r), of stacked experts (experts, out_features, r); as all below, see PaCALayer.
        base_columns: Shape of the delta.
        indices: Shape (r,).
        scaling: ``alpha / r``.
        scale: Shape (r,), or None.
        pending: The selection that will choose the columns.
        conversion: What the adapter's layers share.
        path: Of the layer from the root of the conversion.
    """

    module: nn.Module
    layer_class: type[PaCALayer]
    delta: nn.Parameter
    base_columns: nn.Parameter
    indices: Tensor
    scaling: float
    scale: Tensor | None
    pending: PendingSelection | None
    conversion: Any
    path: str

    @classmethod
    def of(cls, layer: PaCALayer) -> "ParkedColumns":
        """The columns of a layer that is about to be released."""
        return cls(
            layer,
            type(layer),
            layer.paca_delta,
            layer.paca_base_columns,
            layer.paca_indices,
            layer.scaling,
            layer.paca_scale,
            layer.paca_pending,
            layer.paca_conversion,
            layer.paca_path,
        )

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the layer a PaCA layer again, and write the columns.

        Raises:
            PaCAError: If its weight is no longer the base weight they were trained on, as far as some rows tell. The
                layer is then as it was.
        """
        self.layer_class.adopt(self.module, self.indices[:0], self.scaling)  # reads no columns: they are known
        layer = self.module
        assert isinstance(layer, PaCALayer)
        device = layer.base.device
        if layer.keeps_weight and not self._belong_to(layer):  # a packed weight never changes
            layer.release(trained=False)
            raise PaCAError(
                f"The weight of {self.path!r} has changed since the adapter was put aside, so it would be applied to "
                "another base model. Load the base model again, and its adapters onto it."
            )
        for parameter in (self.delta, self.base_columns):
            parameter.data = parameter.data.to(device)  # the model may have moved meanwhile
        layer.r, layer.paca_indices = len(self.indices), self.indices.to(device)
        layer.paca_delta, layer.paca_base_columns = self.delta, self.base_columns
        layer.paca_scale = None if self.scale is None else self.scale.to(device)
        layer.paca_pending, layer.paca_conversion, layer.paca_path = self.pending, self.conversion, self.path
        layer.write_columns()

    def _belong_to(self, layer: PaCALayer) -> bool:
        rows, known = _some_rows(layer._rows()), _some_rows(self.base_columns)
        return torch.equal(rows.index_select(-1, self.indices.to(rows.device)), known.to(rows))


def _some_rows(tensor: Tensor) -> Tensor:
    """At most about 16 rows of a weight or of its columns, evenly spread, shape (..., rows, columns)."""
    return tensor.detach()[..., :: max(1, tensor.shape[-2] // 16), :]
