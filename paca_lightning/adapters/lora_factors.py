"""The factors of a LoRA adapter in PEFT's layout: trained columns are ``B A`` of their update and a selection.

E experts, O out_features, I in_features, R rank. PEFT keeps the factors of all experts of a weight in one pair of
matrices, whose rows and columns it numbers in two orders (0.21, ``lora.ParamWrapper``)::

    A_(E R) I    row e * R + i         selects column ``indices[i]``, the same for every expert
    B_O (R E)    column i * E + e      the update of that column in expert e
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from paca_lightning.adapters.update import whole_update
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.experts import PaCAExperts


def lora_factors(layer: PaCALayer, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B of a layer, fp32, in host memory. Collective for a sharded layer.

    Args:
        layer: Of ``rank`` columns, or fewer: the others are filled up with zeros.
        rank: Of the adapter.
        scaling: Of the adapter; B makes up for the difference to the layer's.

    Returns:
        Shapes (rank, in_features) and (out_features, rank); of stacked experts, as above.
    """
    selection = torch.zeros(rank, layer.in_features)
    selection[torch.arange(layer.r), layer.paca_indices.cpu()] = 1
    update = pad(whole_update(layer).float() * (layer.scaling / scaling), (0, rank - layer.r))
    if isinstance(layer, PaCAExperts):
        return selection.repeat(layer.experts, 1), update.permute(1, 2, 0).flatten(1).contiguous()
    return selection, update


def lora_name(name: str, layer: PaCALayer) -> str:
    """The module of PEFT that holds a layer's factors.

    PEFT wraps an experts module once for each of its adapted parameters, in their order: the last wrapper is outermost.

    Args:
        name: The layer's, in the base model.
        layer: The layer.
    """
    if not isinstance(layer, PaCAExperts):
        return name
    parent = name.rpartition(".")[0]
    adapted = {child.name for child in layer.owner.children() if isinstance(child, PaCAExperts)}
    order = [each for each, _ in layer.owner.named_parameters(recurse=False) if each in adapted]
    return parent + ".base_layer" * (len(order) - 1 - order.index(layer.name))
