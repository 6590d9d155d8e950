"""Export of a trained model as an adapter of PEFT's own PaCA (0.22)."""

import os

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from paca_lightning.adapters.export_files import Tokenizer, common_rank, write_adapter
from paca_lightning.adapters.exported import check_adapter_can_hold, check_quantized_base, named_paca_layers, part_of
from paca_lightning.adapters.files import PREFIX, SETTINGS
from paca_lightning.adapters.update import whole_update
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.experts import PaCAExperts


def export_peft_paca(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    path: str | None = None,
) -> None:
    """Write the training result as an adapter of PEFT's own PaCA (0.22), for inference or more training there.

    Unlike ``save_adapter``, it refuses what PEFT would read as something else, and says everything in PEFT's terms.
    PEFT has one rank and one scaling: layers of a lower rank get more columns, with an update of zero, and an alpha of
    a layer's own goes into its update. The targets are named so that PEFT finds the same layers.

    For a sharded model the call is collective: make it on every rank. The first rank writes.

    Args:
        model: The converted model, or a module around it.
        directory: Is created if it does not exist. Files of the same names are replaced.
        tokenizer: Is saved in the same directory.
        path: Of the model whose adapter to write, in a module that holds several Hugging Face models.

    Raises:
        PaCAError: If the model has no PaCA layers, several Hugging Face models and no path, or trained what PEFT's PaCA
            cannot hold, or if the directory holds an adapter of ours, whose own file would describe another one.
    """
    if os.path.lexists(os.path.join(directory, SETTINGS)):
        raise PaCAError(
            f"{str(directory)!r} holds an adapter that save_adapter wrote, and {SETTINGS} in it would contradict the "
            "one for PEFT. Choose another directory."
        )
    model = part_of(model, path)
    layers = named_paca_layers(model)
    rank, scaling = common_rank(layers)
    _check_layers(layers, rank)
    check_adapter_can_hold(model, "PaCA")
    check_quantized_base(layers)
    tensors = {}
    for name, layer in layers.items():
        indices, update = filled_up(layer.paca_indices.cpu(), whole_update(layer).float(), rank, layer.in_features)
        tensors[f"{PREFIX}{name}.paca_indices"] = indices
        tensors[f"{PREFIX}{name}.paca_delta"] = update * (layer.scaling / scaling)
    settings = {
        "peft_type": "PACA",
        "r": rank,
        "paca_alpha": rank * scaling,
        "random_seed": 0,  # PEFT draws columns before it loads these: not from the global random state
    }
    write_adapter(directory, take_inventory(model), tensors, settings, tokenizer)


def filled_up(indices: Tensor, update: Tensor, rank: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Columns and their update with more columns, of an update of zero, up to a rank; sorted.

    Args:
        indices: Shape (r,), sorted.
        update: Shape (out_features, r).
        rank: At least r, at most in_features.
        in_features: How many columns there are to take.

    Returns:
        Indices, shape (rank,), and update, shape (out_features, rank).
    """
    unused = torch.ones(in_features, dtype=torch.bool).index_fill_(0, indices, False).nonzero()[:, 0]
    columns = torch.cat((indices, unused[: rank - len(indices)]))
    order = columns.argsort()
    return columns[order], pad(update, (0, rank - len(indices)))[:, order.to(update.device)].contiguous()


def _check_layers(layers: dict[str, PaCALayer], rank: int) -> None:
    """Refuse layers that PEFT's PaCA cannot adapt."""
    for name, layer in layers.items():
        if isinstance(layer, PaCAExperts):
            raise PaCAError(
                f"PEFT's PaCA adapts nn.Linear alone, and {name!r} are stacked experts. Use export_lora or "
                "export_merged."
            )
        if layer.paca_base_class.__name__ == "Conv1D":
            raise PaCAError(
                f"PEFT's PaCA adapts nn.Linear alone, and {name!r} is a Conv1D. Use export_lora or export_merged."
            )
        if layer.in_features < rank:
            raise PaCAError(
                f"PEFT's PaCA has one rank for all layers, here {rank}, and {name!r} has {layer.in_features} input "
                "columns. Use export_lora or export_merged."
            )
