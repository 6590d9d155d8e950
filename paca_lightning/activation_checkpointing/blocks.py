"""The blocks of a model, and their activation checkpointing: activations are recomputed in the backward."""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn

from paca_lightning.activation_checkpointing.selective import contexts
from paca_lightning.core.errors import PaCAError, did_you_mean
from paca_lightning.core.private.torch import storage_id
from paca_lightning.core.private.transformers import block_classes

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What blocks call a key-value cache; the first since transformers 5.24."""


def find_blocks(model: nn.Module, class_names: Iterable[str] | None = None) -> list[nn.Module]:
    """The repeated blocks of a model, which are gathered and recomputed as a whole.

    Args:
        model: Any module.
        class_names: Names of their classes. Default: those in ``_no_split_modules`` of the Hugging Face models in it.

    Returns:
        The outermost modules of these classes, in order. Empty for a model that declares none.

    Raises:
        PaCAError: If no module has a class of a given name.
    """
    if class_names is None:
        wanted = set().union(*map(block_classes, model.modules()))
    else:
        wanted = set(class_names)
        _check_class_names(model, wanted)
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and type(module).__name__ in wanted:
            blocks.append(module)
            inside.update(module.modules())
    return blocks


def checkpoint_blocks(blocks: Iterable[nn.Module], *, offload: bool = False, selective: bool = False) -> None:
    """Recompute blocks in the backward instead of keeping their activations.

    The forward of each block is replaced; the block is not wrapped. Module paths stay the same, and hooks run outside
    the replaced forward, so that FSDP2 gathers once for the recomputation and the backward.

    Args:
        blocks: The blocks. Those that Hugging Face already checkpoints are left alone.
        offload: Keep the blocks' inputs in host memory.
        selective: Also keep the outputs of GEMMs and attention, and recompute the rest.
    """
    for block in blocks:
        if not getattr(block, "gradient_checkpointing", False) and "forward" not in vars(block):
            # A partial, because deepcopy follows its arguments: a copied block computes with its own weights.
            context_fn = contexts if selective else noop_context_fn
            block.forward = functools.partial(_forward, block, offload, context_fn)


def are_checkpointed(model: nn.Module) -> bool:
    """Whether :func:`checkpoint_blocks` recomputes a block of a model."""
    return any(getattr(vars(module).get("forward"), "func", None) is _forward for module in model.modules())


def _check_class_names(model: nn.Module, wanted: set[str]) -> None:
    present = {type(module).__name__ for module in model.modules()}
    for name in sorted(wanted - present):
        hint = did_you_mean(name, present)
        raise PaCAError(f"blocks: no module of the model is a {name!r}; its classes are {sorted(present)}.{hint}")


def _forward(block: nn.Module, offload: bool, context_fn: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    # The recomputation would append to a key-value cache a second time.
    kwargs |= {name: None for name in CACHES if name in kwargs}
    with _offloaded(args, kwargs) if offload else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)


def _offloaded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Hooks that keep inputs with a gradient in host memory. Masks and positions are shared by all blocks and stay."""
    storages = {
        storage_id(tensor.untyped_storage())
        for tensor in (*args, *kwargs.values())
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if storage_id(tensor.untyped_storage()) not in storages:
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
    """A tensor on the given device."""
    return tensor.to(device, non_blocking=True)
