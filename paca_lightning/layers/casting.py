"""What a cast or a move of a model does to the tensors of a PaCA layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def keeping_precision(
    fn: Callable[[Tensor], Tensor], widened: Sequence[Tensor | None], fixed: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``Module._apply``, but without narrowing some tensors.

    ``bf16-true`` casts every parameter of a model, and would round away small updates of a delta.

    Args:
        fn: Moves or casts a tensor. That of ``to_empty`` returns uninitialized memory.
        widened: Delta, base columns and gradient: their dtype may become wider only, and they leave meta as zeros,
            which is how a delta starts.
        fixed: Tensors that keep their dtype.
    """

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if any(tensor is one for one in widened):
            if tensor.is_meta and not result.is_meta:
                return torch.zeros_like(result)
            return tensor.to(device=result.device, dtype=torch.promote_types(result.dtype, tensor.dtype))
        if any(tensor is one for one in fixed) and result.dtype != tensor.dtype:
            return tensor.to(device=result.device)
        return result

    return apply
