"""Activation checkpointing and compilation of the decoder blocks of a Hugging Face model."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.core.errors import PaCAError


def check_block_settings(activation_checkpointing: bool | Literal["selective"], compile: bool) -> None:
    """Check what a module is asked to do with its blocks.

    Raises:
        PaCAError: If a setting is unknown, or excluded by the other.
    """
    if activation_checkpointing not in (False, True, "selective"):
        raise PaCAError(
            f"activation_checkpointing={activation_checkpointing!r} is unknown. Choose false, true or selective."
        )
    if compile and activation_checkpointing == "selective":
        raise PaCAError("torch.compile chooses itself what to recompute: turn activation_checkpointing off.")


def checkpoint_activations(model: PreTrainedModel, how: bool | Literal["selective"]) -> None:
    """Recompute the activations of each block in the backward, instead of saving them.

    Args:
        model: A model that is not wrapped or sharded yet.
        how: True for all activations, ``selective`` for cheap ones, False for none.

    Raises:
        PaCAError: If the model does not support it.
    """
    if how == "selective":
        checkpoint_blocks(_blocks(model, "activation_checkpointing"), selective=True)
    elif how:
        # Renamed in transformers 5.23. The reentrant variant gives no gradients if nothing below a block is trained.
        enable: Callable[[dict[str, Any]], None] = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise PaCAError(f"{type(model).__name__} cannot checkpoint its activations: {error}") from error


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each block at its first call. Identical blocks share one graph; layers can be converted until then.

    Raises:
        PaCAError: If the model does not name its blocks.
    """
    for block in _blocks(model, "compile"):
        block.compile()


def _blocks(model: PreTrainedModel, setting: str) -> list[nn.Module]:
    blocks = find_blocks(model)
    if not blocks:
        raise PaCAError(f"{type(model).__name__} does not name its decoder blocks, which `{setting}` needs.")
    return blocks
