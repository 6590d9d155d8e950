"""Which layers their user froze before a conversion: what is frozen beside trainable layers stays frozen."""

from collections.abc import Iterable, Mapping

from torch import nn

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.stacked import holder_of, weight_name, weight_of
from paca_lightning.layers.base import PaCALayer


def frozen_by_hand(
    inventory: Inventory, linears: Iterable[nn.Module], was_trainable: Mapping[str, bool]
) -> tuple[list[nn.Module], str | None]:
    """Which linear layers ``all-linear`` leaves frozen, as their user froze them beside trainable ones.

    Where no linear layer of the Hugging Face model is trainable, it was frozen as a whole, as people do before they add
    a few parameters, and is converted. The same holds for any other model without trainable linear layers.

    Returns:
        The layers to leave frozen, and the class of the model that was frozen as a whole, or None.
    """

    def trainable(module: nn.Module) -> bool:
        weight = weight_of(module)
        if isinstance(module, PaCALayer) or weight is None or not weight.is_floating_point():
            return True  # quantized weights are never trainable
        return was_trainable.get(weight_name(module, inventory.paths[module][0]), weight.requires_grad)

    frozen = [module for module in linears if not trainable(module)]
    if not frozen:
        return [], None
    inside = [set(model.modules()) for model in inventory.base_models.values()] or [set(inventory.paths)]
    in_models = [module for module in linears if any(holder_of(module) in modules for modules in inside)]
    if any(trainable(module) for module in in_models):
        return frozen, None
    whole = inventory.base_model or inventory.root
    return [module for module in frozen if holder_of(module) not in inside[0]], type(whole).__name__
