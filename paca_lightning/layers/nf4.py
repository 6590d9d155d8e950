"""Row-blocked NF4: weights in 4 bits whose scale blocks never cross a row, through bitsandbytes' registered operators.

NF4 (QLoRA, arXiv 2305.14314) stores each weight as one of 16 levels times the largest magnitude of its block. Here a
block is 64 weights of one row, so that rows can be sharded, read and quantized on their own. The scales are bf16, 4.25
bits a weight in all: the largest magnitude of bf16 weights is itself a bf16 number, so nothing is lost for them.
"""

import copy
import functools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError

BLOCK_SIZE = 64
SCALE_DTYPE = torch.bfloat16
NESTED_BLOCK_SIZE = 256
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Weights quantized at a time: the operator without a native kernel needs many times their size for its temporaries.
CHUNK = 2**22
HPU_VERSIONS = (Version("0.47"), Version("0.49.2"))
"""The oldest bitsandbytes with operators for Gaudi, and the newest that is recommended there."""

# On processors with AVX512-BF16 its import complains that a package is missing which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

Scales = tuple[Tensor, ...]
"""Scales of the blocks.

``(absmax,)`` of shape (rows, blocks); or, where they are quantized to 8 bits themselves as bitsandbytes' nested
statistics are, ``(absmax, scale, phase, code, offset)``: uint8 codes (rows, blocks), the scales of the runs of 256
codes that a row touches (rows, runs), how far into the first of them the row begins (rows, 1), and, for all rows, the
values of the 256 codes and the mean.
"""


def packed_shapes(out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the packed weight, two weights a byte, and of its scales; rows are padded to whole blocks."""
    blocks = -(-in_features // BLOCK_SIZE)
    return (out_features, blocks * BLOCK_SIZE // 2), (out_features, blocks)


def quantize_rows(weight: Tensor, path: str = "") -> tuple[Tensor, Tensor]:
    """Quantize some rows of a weight. Rows are independent: any split of them gives the same bits.

    Args:
        weight: Shape (rows, in_features), of any floating dtype, on any device, ``meta`` included.
        path: Where the weight comes from, for the error.

    Returns:
        The packed weight, uint8, and its scales, bf16, of the shapes that ``packed_shapes`` tells.

    Raises:
        PaCAError: If a weight is not finite, or on an HPU bitsandbytes is too old.
    """
    shapes = packed_shapes(*weight.shape)
    packed = torch.empty(shapes[0], dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(shapes[1], dtype=SCALE_DTYPE, device=weight.device)
    if weight.is_meta or weight.numel() == 0:
        return packed, absmax
    _load_operators(weight.device)
    _check_finite(weight, path)
    padding = 2 * packed.shape[1] - weight.shape[1]
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        rows = F.pad(rows if rows.dtype in KERNEL_DTYPES else rows.float(), (0, padding)).contiguous()
        codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(rows, BLOCK_SIZE, "nf4", torch.uint8)
        packed[start : start + step] = codes.view(len(rows), -1)
        absmax[start : start + step] = scales.view(len(rows), -1)
    return packed, absmax


def dequantize_rows(
    packed: Tensor, scales: Scales, in_features: int, dtype: torch.dtype, *, anew: bool = False
) -> Tensor:
    """The weights that packed rows stand for.

    Args:
        packed: Shape (rows, padded in_features / 2), uint8.
        scales: Of its blocks, whose size follows from the shapes.
        in_features: Length of a row without padding.
        dtype: Of the result.
        anew: Be another computation for torch.compile than without, or it would keep a first result in place of the
            second.

    Returns:
        A fresh tensor (or, of padded rows, a view of one), shape (rows, in_features).
    """
    _load_operators(packed.device)
    absmax = scales[0].float() if len(scales) == 1 else _nested_absmax(*scales)
    rows, padded = packed.shape[0], 2 * packed.shape[1]
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.reshape(1, -1) if anew else packed.reshape(-1, 1),
        absmax.reshape(-1),
        padded // absmax.shape[1],
        "nf4",
        [rows, padded],
        dtype if dtype in KERNEL_DTYPES else torch.float32,
    )
    return weight[:, :in_features].to(dtype)


def squared_errors(weight: Tensor, path: str = "") -> Tensor:
    """How much quantization hurts each column: the sum over rows of the squared error; over ranks, it adds up.

    Args:
        weight: Shape (rows, in_features).
        path: Where the weight comes from, for the error.

    Returns:
        Shape (in_features,), fp32.
    """
    packed, absmax = quantize_rows(weight, path)
    errors = torch.zeros(weight.shape[1], device=weight.device)
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        restored = dequantize_rows(packed[rows], (absmax[rows],), weight.shape[1], torch.float32)
        errors += (weight[rows].float() - restored).square().sum(0)
    return errors


def check_hpu_backend() -> None:
    """Make sure that the installed bitsandbytes can serve Gaudi; warn, once on a host, if it is a newer one.

    Raises:
        PaCAError: If it is too old.
    """
    import bitsandbytes

    _check_hpu_version(bitsandbytes.__version__)


@functools.cache
def _check_hpu_version(installed: str) -> None:
    oldest, newest = HPU_VERSIONS
    remedy = f"pip install 'bitsandbytes>={oldest},<={newest}'"
    if Version(installed) < oldest:
        raise PaCAError(f"bitsandbytes {installed} has no NF4 operators for Gaudi, which came with {oldest}: {remedy}.")
    if Version(installed) > newest and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"bitsandbytes {installed} is newer than is recommended for NF4 on Gaudi. If it fails there: {remedy}.",
            stacklevel=2,
        )


def linear4bit_class() -> type[nn.Module] | None:
    """``bitsandbytes.nn.Linear4bit``, if bitsandbytes was imported: without it no model can hold one."""
    return getattr(sys.modules.get("bitsandbytes.nn"), "Linear4bit", None)


def linear4bit(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A frozen ``Linear4bit`` as QLoRA uses it: NF4 in blocks of 64 with nested statistics.

    Args:
        weight: Shape (out_features, in_features); left as it is. On ``meta`` nothing is quantized. The layer computes
            in its dtype.
        bias: Shape (out_features,).
    """
    from bitsandbytes.nn import modules as bnb

    # On meta no random weight is drawn.
    layer: Any = bnb.Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, device="meta")
    frozen: Any = bnb.Params4bit(weight.detach(), blocksize=BLOCK_SIZE, quant_type="nf4", module=layer)
    layer.weight = frozen.to(weight.device)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def linear4bit_obstacle(module: nn.Module) -> str | None:
    """Why the bits of a ``Linear4bit`` cannot be kept, if so."""
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

    One that still holds its full-precision weight is quantized here.
    """
    weight: Any = module.weight
    if weight.quant_state is None:
        packed, absmax = quantize_rows(weight.detach(), path)
        return packed, (absmax,), weight.dtype
    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        data, state = _undo_cpu_packing(data, state)
    rows, in_features = state.shape
    packed = data.view(torch.uint8).reshape(rows, in_features // 2)
    absmax = state.absmax.reshape(rows, -1)
    if not state.nested:
        narrow = absmax.to(SCALE_DTYPE)  # exact for a layer made from bf16 weights
        return packed, (narrow if torch.equal(narrow.to(absmax.dtype), absmax) else absmax,), state.dtype
    blocks = absmax.shape[1]
    start = torch.arange(rows, device=packed.device)[:, None] * blocks
    runs = (start % NESTED_BLOCK_SIZE + blocks - 1) // NESTED_BLOCK_SIZE
    run = start // NESTED_BLOCK_SIZE + torch.arange(int(runs.max()) + 1, device=packed.device)
    scale = state.state2.absmax[run.clamp(max=len(state.state2.absmax) - 1)]
    phase = (start % NESTED_BLOCK_SIZE).to(torch.uint8)
    return packed, (absmax, scale, phase, state.state2.code, state.offset), state.dtype


def _nested_absmax(absmax: Tensor, scale: Tensor, phase: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    run = (phase.long() + torch.arange(absmax.shape[1], device=absmax.device)) // NESTED_BLOCK_SIZE
    return code[absmax.long()] * scale.gather(1, run) + offset


def _undo_cpu_packing(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Undo the layout into which an inference on a CPU with AVX512-BF16 brings a ``Linear4bit``.

    Its scales were rounded to bf16 there, for good.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    state.absmax = state.absmax.t().contiguous()
    state.original_nested = False
    return _convert_weight_packed_for_cpu_inverse(data, state)


def _check_finite(weight: Tensor, path: str) -> None:
    extremes: Sequence[Tensor] = weight.aminmax()  # NaN if there is one, and no temporary
    if not all(bool(extreme.isfinite()) for extreme in extremes):
        where = f" of {path!r}" if path else ""
        raise PaCAError(f"The weight{where} holds NaN or infinite values, which NF4 cannot store. Is the file damaged?")


def _load_operators(device: torch.device) -> None:
    """Register the operators. The import takes seconds, so it waits until they are needed."""
    import bitsandbytes  # noqa: F401

    if torch.compiler.is_compiling():
        return
    if device.type == "hpu":
        check_hpu_backend()
    _make_levels(device)


@functools.cache
def _make_levels(device: torch.device) -> None:
    """Let bitsandbytes make NF4's levels in fp32: it keeps them in the default dtype of their first use (0.50).

    Under Lightning's ``bf16-true`` that would be bf16, for the rest of the process.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        block = torch.ones(1, BLOCK_SIZE, device=device)
        torch.ops.bitsandbytes.quantize_4bit.default(block, BLOCK_SIZE, "nf4", torch.uint8)
    finally:
        torch.set_default_dtype(default)
