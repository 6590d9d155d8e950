"""bitsandbytes' ``Linear4bit``: what QLoRA's frozen layers are made of, and how a PaCA layer keeps their bits."""

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.core.private.bitsandbytes import undo_cpu_packing
from paca_lightning.core.private.torch import clear_load_hooks
from paca_lightning.layers.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, SCALE_DTYPE, Scales, quantize_rows

ATTRIBUTES = ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu")
"""Instance attributes that ``Linear4bit`` has beyond those of ``nn.Linear``."""


def linear4bit_class() -> type[nn.Module] | None:
    """``bitsandbytes.nn.Linear4bit``, or None if bitsandbytes is not imported: then no model can hold one."""
    return getattr(sys.modules.get("bitsandbytes.nn"), "Linear4bit", None)


def is_quantized_linear4bit(module: nn.Module) -> bool:
    """Whether a module is a ``Linear4bit`` whose weight is quantized already, as moving it to a device does."""
    kind = linear4bit_class()
    return kind is not None and isinstance(module, kind) and getattr(module.weight, "quant_state", None) is not None


def linear4bit(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A frozen ``Linear4bit`` as QLoRA uses it: NF4 in blocks of 64 with nested statistics.

    Args:
        weight: Shape (out_features, in_features). It is not changed, and on ``meta`` not quantized. The layer computes
            in its dtype.
        bias: Shape (out_features,).
    """
    from bitsandbytes.nn import modules as bnb

    # On meta no random weight is drawn.
    layer: Any = bnb.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, device="meta")
    layer.support_avx512bf16_for_cpu = False  # see keep_plain_layout
    frozen: Any = bnb.Params4bit(weight.detach(), blocksize=BLOCK_SIZE, quant_type="nf4", module=layer)
    layer.weight = frozen.to(weight.device)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def linear4bit_obstacle(module: nn.Module) -> str | None:
    """Why a PaCA layer cannot keep the bits of a ``Linear4bit``; None if it can."""
    weight: Any = module.weight
    if weight.quant_type != "nf4":
        return f"its quantization is {weight.quant_type}, not nf4"
    state = weight.quant_state
    if state is None:
        return None
    if state.shape[1] % state.blocksize:
        return (
            f"its quantization blocks of {state.blocksize} weights cross its rows of {state.shape[1]}; quantize the "
            "full-precision model with quantize='nf4' instead"
        )
    if state.nested and state.state2.blocksize != NESTED_BLOCK_SIZE:
        return f"its statistics are nested in blocks of {state.state2.blocksize}, not {NESTED_BLOCK_SIZE}"
    return None


def from_linear4bit(module: nn.Module, path: str = "") -> tuple[Tensor, Scales, torch.dtype]:
    """Packed weight, scales and original dtype of a ``Linear4bit``: the same bits, nested statistics included.

    A layer that still holds its full-precision weight is quantized here.

    Args:
        module: The layer. It is not changed.
        path: Names it in the error.

    Returns:
        As ``nf4.dequantize_rows`` takes them.

    Raises:
        PaCAError: If a full-precision weight is not finite.
    """
    weight: Any = module.weight
    if weight.quant_state is None:
        packed, absmax = quantize_rows(weight.detach(), path)
        return packed, (absmax,), weight.dtype
    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _without_cpu_packing(data, state)
    rows, in_features = state.shape
    packed = data.view(torch.uint8).reshape(rows, in_features // 2)
    absmax = state.absmax.reshape(rows, -1)  # (rows, blocks)
    if not state.nested:
        narrow = absmax.to(SCALE_DTYPE)  # exact for a layer made from bf16 weights
        return packed, (narrow if torch.equal(narrow.to(absmax.dtype), absmax) else absmax,), state.dtype
    return packed, _nested_scales(absmax, state), state.dtype


def keep_plain_layout(modules: Iterable[nn.Module]) -> None:
    """Keep the ``Linear4bit`` layers among modules that are trained from packing their weights anew for inference.

    A forward in eval mode does so on a CPU with AVX512-BF16, as of a validation. A backward through such a layer reads
    the weight in the usual layout: its gradients are wrong, without an error (bitsandbytes 0.50.2).
    """
    kind = linear4bit_class()
    for module in modules if kind is not None else ():
        if isinstance(module, kind):  # type: ignore[arg-type]
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                layer.weight.data, layer.weight.quant_state = _without_cpu_packing(
                    layer.weight.data, layer.weight.quant_state
                )


def strip_linear4bit(module: nn.Module) -> None:
    """Remove what makes a layer a ``Linear4bit``, so that another class can take it over: only the bias stays."""
    del module.weight
    for name in ATTRIBUTES:
        vars(module).pop(name, None)
    clear_load_hooks(module)  # subclasses of Linear4bit (Lightning's) quantize what is loaded into them


def _nested_scales(absmax: Tensor, state: Any) -> Scales:
    """Scales that are quantized themselves, by row: bitsandbytes quantizes runs of 256 across rows."""
    rows, blocks = absmax.shape
    start = torch.arange(rows, device=absmax.device)[:, None] * blocks  # (rows, 1)
    runs = (start % NESTED_BLOCK_SIZE + blocks - 1) // NESTED_BLOCK_SIZE
    run = start // NESTED_BLOCK_SIZE + torch.arange(int(runs.max()) + 1, device=absmax.device)  # (rows, runs)
    scale = state.state2.absmax[run.clamp(max=len(state.state2.absmax) - 1)]
    phase = (start % NESTED_BLOCK_SIZE).to(torch.uint8)
    return absmax, scale, phase, state.state2.code, state.offset


def _without_cpu_packing(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Packed weight and state in the usual layout: inference on a CPU with AVX512-BF16 leaves another one.

    The scales have been rounded to bf16 there, for good.
    """
    state = copy.copy(state)
    state.absmax = state.absmax.t().contiguous()
    state.original_nested = False
    return undo_cpu_packing(data, state)
