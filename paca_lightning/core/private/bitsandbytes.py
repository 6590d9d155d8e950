"""Private APIs of bitsandbytes (read in 0.50.2)."""

from typing import Any

from torch import Tensor


def undo_cpu_packing(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The usual layout of a ``Linear4bit``'s weight that an inference on a CPU with AVX512-BF16 has packed anew.

    Args:
        packed: Shape (out_features, in_features / 2), uint8.
        state: Its ``QuantState``; it is changed.

    Returns:
        The packed weight, and its state. bitsandbytes itself does this only when a layer is saved or leaves
        the CPU.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight, state = _convert_weight_packed_for_cpu_inverse(packed, state)
    return weight, state
