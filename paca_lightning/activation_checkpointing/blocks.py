"""Activation checkpointing by block: activations are recomputed in the backward, from what little is kept."""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn

from paca_lightning.activation_checkpointing.selective import contexts

CACHES = ("past_key_values", "past_key_value", "layer_past")


def checkpoint_blocks(blocks: Iterable[nn.Module], *, offload: bool = False, selective: bool = False) -> None:
    """Recompute blocks in the backward instead of keeping their activations.

    Each block's forward is replaced, not the block wrapped: module paths stay, and hooks run outside, so that FSDP2
    gathers once for the recomputation and the backward.

    Args:
        blocks: The blocks. Blocks that Hugging Face checkpoints already are left to it.
        offload: Keep the blocks' inputs in host memory.
        selective: Besides these, keep the outputs of matrix products and of attention, and recompute the rest.
    """
    for block in blocks:
        if not getattr(block, "gradient_checkpointing", False) and "forward" not in vars(block):
            # Not a closure: a copy of the block, such as a weight average, must compute with its own weights.
            context_fn = contexts if selective else noop_context_fn
            block.forward = functools.partial(_forward, block, offload, context_fn)


def _forward(block: nn.Module, offload: bool, context_fn: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    # A key-value cache would grow once more in the recomputation.
    kwargs |= {name: None for name in CACHES if name in kwargs}
    with _offloaded(args, kwargs) if offload else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)


def _offloaded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Inputs with a gradient wait in host memory. The others (masks, positions) are shared by all blocks: they stay."""
    storages = {
        tensor.untyped_storage()._cdata
        for tensor in (*args, *kwargs.values())
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage()._cdata not in storages:
            return tensor.device, tensor
        return tensor.device, to_host(tensor)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return to_device(tensor, device)

    return saved_tensors_hooks(pack, unpack)


def to_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor in host memory, pinned if it comes from an accelerator."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
    return pinned.copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor where it is needed."""
    return tensor.to(device, non_blocking=True)
