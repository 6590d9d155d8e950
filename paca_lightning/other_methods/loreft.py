"""LoReFT: low-rank edits of hidden states at a few tokens of the prompt (Wu et al. 2024).

https://arxiv.org/abs/2404.03592, equation 2: ``Phi(h) = h + R^T (W h + b - R h)``, with orthonormal rows of R.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks
from paca_lightning.core.errors import PaCAError
from paca_lightning.other_methods.inserted import Inserted, InsertedModel, blocks_of, insert, owner_of
from paca_lightning.other_methods.prompt_positions import PromptPositions

METHOD = "LoReFT"


class LowRankEdit(nn.Module):
    """``R^T (W h + b - R h)`` of hidden states h: what LoReFT adds to them.

    It begins as zero: W = R and b = 0.

    Args:
        features: D.
        rank: r.

    Shapes: ``rotation``, ``weight`` (r, D), ``bias`` (r,). R is made of ``rotation``, whatever an optimizer does to it.
    """

    def __init__(self, features: int, rank: int) -> None:
        super().__init__()
        self.rotation = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, features, dtype=torch.float32)))
        self.weight = nn.Parameter(self.rotation.detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank, dtype=torch.float32))
        with torch.no_grad():
            self.weight.copy_(orthonormal_rows(self.rotation))

    def forward(self, hidden: Tensor) -> Tensor:
        """What to add to hidden states (..., D)."""
        rotation = orthonormal_rows(self.rotation)
        return F.linear(hidden, self.weight - rotation, self.bias) @ rotation


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """R of ``matrix = L R`` with a lower triangular L of positive diagonal: its rows made orthonormal in their order.

    By Cholesky: R is unique and smooth in the matrix, which QR's signs are not, and costs two small kernels.

    Args:
        matrix: Shape (r, D), of rank r.
    """
    factor, _ = torch.linalg.cholesky_ex(matrix @ matrix.T)  # does not wait for the device
    return torch.linalg.solve_triangular(factor, matrix, upper=False)


class LoReFTIntervention(Inserted):
    """Edits the hidden states of a block at the positions of a forward.

    Args:
        features: D.
        rank: r.
        positions: Of the present forward.
        tied: Whether the first and the last tokens share one edit.
    """

    NAME = "loreft"

    def __init__(self, features: int, rank: int, positions: PromptPositions, *, tied: bool) -> None:
        super().__init__()
        self.positions = positions
        several = bool(positions.first and positions.last) and not tied
        self.edits = nn.ModuleList(LowRankEdit(features, rank) for _ in range(2 if several else 1))

    @override
    def edit(self, hidden: Tensor) -> Tensor:
        if (where := self.positions.current) is None:
            return hidden
        # The rotation would not be orthonormal in half precision.
        with torch.autocast(hidden.device.type, enabled=False):
            index = where.index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            rows = hidden.gather(1, index).float()
            parts = rows.tensor_split([self.positions.first], 1) if len(self.edits) == 2 else (rows,)
            added = torch.cat([edit(part) for edit, part in zip(self.edits, parts, strict=True)], 1)
            added = (added * where.valid.unsqueeze(-1)).to(hidden.dtype)
            return hidden.scatter_add(1, index, added)


class LoReFTModel(InsertedModel):
    """A model with LoReFT's interventions.

    Args:
        model: The model.
        settings: The method's settings.
        positions: Of the interventions; a run tells them its prompts.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any], positions: PromptPositions) -> None:
        super().__init__(METHOD, model, settings)
        self.positions = positions


def insert_loreft(
    model: nn.Module,
    rank: int = 4,
    first: int = 4,
    last: int = 4,
    layers: list[int] | None = None,
    tied: bool = False,
    block_classes: list[str] | None = None,
) -> LoReFTModel:
    """Insert LoReFT's interventions behind blocks of a model, and freeze all else.

    Args:
        model: A decoder.
        rank: r, rows of R.
        first: Number of the prompt's first tokens to edit.
        last: Number of its last ones.
        layers: Blocks to edit, counted from 0; negative ones from the end. Default: all.
        tied: Whether the first and the last tokens share one edit.
        block_classes: Names of the blocks' classes. Default: those that a Hugging Face model declares.

    Raises:
        PaCAError: If a setting is out of range, or the model has no such blocks.
    """
    if rank < 1 or first < 0 or last < 0 or first + last == 0:
        raise PaCAError(f"LoReFT: rank={rank}, first={first}, last={last}: rank and the number of tokens are positive.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PaCAError("LoReFT edits the prompt of a decoder, and this model has an encoder. Use another method.")
    blocks = blocks_of(model, block_classes, METHOD)
    paths, chosen = list(blocks), range(len(blocks)) if layers is None else layers
    if beyond := [layer for layer in chosen if not -len(paths) <= layer < len(paths)]:
        raise PaCAError(f"layers: there is no block {beyond[0]}; the model has {len(paths)}, counted from 0.")
    places = {path: blocks[path] for path in dict.fromkeys(paths[layer] for layer in chosen)}
    positions = PromptPositions(first, last)
    settings: dict[str, Any] = {
        "rank": rank,
        "first": first,
        "last": last,
        "layers": layers,
        "tied": tied,
        "block_classes": block_classes,
    }
    insert(model, places, lambda features: LoReFTIntervention(features, rank, positions, tied=tied))
    for owner in dict.fromkeys(owner_of(model, path) or model for path in places):
        owner.register_forward_pre_hook(positions.begin, with_kwargs=True)
    _checkpoint_inside(blocks)
    return LoReFTModel(model, settings, positions)


def _checkpoint_inside(blocks: dict[str, nn.Module]) -> None:
    """Let blocks that Hugging Face recomputes be recomputed without their hooks.

    Hugging Face recomputes a block with its hooks, in the backward, when the positions may be another forward's.
    """
    theirs: list[Any] = [block for block in blocks.values() if getattr(block, "gradient_checkpointing", False)]
    for block in theirs:
        block.gradient_checkpointing = False
    checkpoint_blocks(theirs)
