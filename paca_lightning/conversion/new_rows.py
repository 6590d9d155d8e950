"""The rows of new tokens that a conversion trains beside the columns."""

from torch import nn

from paca_lightning.conversion.inventory import Inventory
from paca_lightning.conversion.targets import Resolution
from paca_lightning.core.dtensor import is_sharded
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import declared_new_tokens
from paca_lightning.core.vocabulary import ends_of


def find_new_rows(
    inventory: Inventory, resolution: Resolution
) -> list[tuple[nn.Embedding, nn.Linear, tuple[int, ...]]]:
    """Embedding, head and rows of each Hugging Face model whose builder declared new tokens, to train their rows.

    Args:
        inventory: Of the model.
        resolution: The layers to convert, and the modules that are trained whole.

    Raises:
        PaCAError: If the settings train the embedding or the head in another way, or it is sharded already.
    """
    found = []
    whole = {part for module in resolution.saved.values() for part in module.modules()}
    targets = {target.module for target in resolution.targets}
    for model in inventory.base_models.values():
        new = declared_new_tokens(model)
        if new is None or new.train != "rows":
            continue
        embedding, head = ends_of(model)
        for end in (embedding, head):
            path = inventory.paths[end][0]
            if end in whole:
                raise PaCAError(
                    f"modules_to_save trains {path!r} whole, and of it the rows of new tokens are trained. Take it out "
                    "of modules_to_save, or set new_tokens_train: all."
                )
            if end in targets:
                raise PaCAError(
                    f"target_modules names {path!r}, of which the rows of new tokens are trained. Exclude it: "
                    f"exclude_modules: [{path.rpartition('.')[2]}]."
                )
            if is_sharded(end.weight):
                raise PaCAError(f"{path!r} is sharded already. Convert the model before that.")
        found.append((embedding, head, new.ids))
    return found
