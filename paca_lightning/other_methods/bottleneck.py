"""Bottleneck adapters: two small layers with a non-linearity after the sublayers of each block.

Houlsby et al. 2019, https://arxiv.org/abs/1902.00751 (sections 2.1 and 3.6), and Pfeiffer et al. 2021,
https://arxiv.org/abs/2005.00247 (section 3).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.other_methods.inserted import Inserted, InsertedModel, blocks_of, insert

METHOD = "bottleneck adapters"
DEVIATION = 0.01
"""Of the initial weights, which are drawn from a normal distribution and cut off at twice of it."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": F.tanh}
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
"""Names of a block's sublayers in Hugging Face models."""


class BottleneckAdapter(Inserted):
    """``y + W_up f(W_down y + b_down) + b_up`` of hidden states y.

    Args:
        features: D.
        size: m, the width of the bottleneck.
        activation: f, a name in ``ACTIVATIONS``.

    Shapes: ``y`` (B, T, D), ``W_down`` (m, D), ``W_up`` (D, m).
    """

    NAME = "bottleneck"

    def __init__(self, features: int, size: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(features, size, dtype=torch.float32)
        self.up = nn.Linear(size, features, dtype=torch.float32)
        for layer in (self.down, self.up):  # so that the adapter begins near the identity
            nn.init.trunc_normal_(layer.weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)
            nn.init.zeros_(layer.bias)

    @override
    def edit(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(self.down.weight.dtype)
        return hidden + self.up(ACTIVATIONS[self.activation](self.down(wide))).to(hidden.dtype)


def insert_bottlenecks(
    model: nn.Module,
    size: int = 64,
    placement: Literal["houlsby", "pfeiffer"] = "houlsby",
    activation: str | None = None,
    block_classes: list[str] | None = None,
    sublayers: list[str] | None = None,
) -> InsertedModel:
    """Insert bottleneck adapters into every block of a model, and freeze all else.

    Args:
        model: A Hugging Face model, or any module whose blocks and sublayers are named.
        size: Width of the bottleneck.
        placement: ``houlsby``: after attention and after the feed-forward layer, each before its residual connection.
            ``pfeiffer``: one, after the block, which is behind the feed-forward layer's residual connection.
        activation: ``gelu``, ``relu``, ``silu`` or ``tanh``. Default: that of the placement's authors, ``gelu`` for
            Houlsby, ``relu`` for Pfeiffer.
        block_classes: Names of the blocks' classes. Default: those that a Hugging Face model declares.
        sublayers: Names of the sublayers in a block, for ``houlsby``. Default: those of Hugging Face models.

    Raises:
        PaCAError: If a setting is unknown, or the blocks or their sublayers are not found.
    """
    if size < 1:
        raise PaCAError(f"size={size}: the width of the bottleneck must be positive.")
    if placement not in ("houlsby", "pfeiffer"):
        raise PaCAError(f"placement={placement!r} is unknown. Choose houlsby or pfeiffer.")
    if activation not in (None, *ACTIVATIONS):
        raise PaCAError(f"activation={activation!r} is unknown. Choose {', '.join(ACTIVATIONS)}.")
    chosen = activation or ("gelu" if placement == "houlsby" else "relu")
    places = blocks_of(model, block_classes, METHOD)
    if placement == "houlsby":
        places = {
            f"{path}.{name}": block.get_submodule(name)
            for path, block in places.items()
            for name in _sublayers(path, block, sublayers)
        }
    settings: dict[str, Any] = {
        "size": size,
        "placement": placement,
        "activation": chosen,
        "block_classes": block_classes,
        "sublayers": sublayers,
    }
    insert(model, places, lambda features: BottleneckAdapter(features, size, chosen))
    return InsertedModel(METHOD, model, settings)


def _sublayers(path: str, block: nn.Module, names: list[str] | None) -> list[str]:
    children = [name for name, _ in block.named_children()]
    if names is not None:
        if missing := [name for name in names if name not in children]:
            raise PaCAError(f"sublayers: {path!r} has no {missing[0]!r}; its modules are {children}.")
        return names
    found = [next((name for name in known if name in children), None) for known in (ATTENTION, FEED_FORWARD)]
    if None in found:
        raise PaCAError(
            f"{path!r} has no attention or feed-forward layer of a known name; its modules are {children}. Name "
            "the two with sublayers, or set placement: pfeiffer, which needs none."
        )
    return [name for name in found if name is not None]
