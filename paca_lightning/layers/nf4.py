"""Row-blocked NF4: the codec. Weights in 4 bits, with scale blocks that never cross a row.

NF4 (QLoRA, arXiv 2305.14314) stores each weight as one of 16 levels times the largest magnitude of its block. Here a
block is 64 weights of one row, so that rows can be sharded, read and quantized independently. The scales are bf16,
which makes 4.25 bits a weight. For bf16 weights they are exact, because the largest magnitude is one of the weights.
The arithmetic is done by bitsandbytes' operators.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.bitsandbytes import load_operators

BLOCK_SIZE = 64
SCALE_DTYPE = torch.bfloat16
NESTED_BLOCK_SIZE = 256
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2**22
"""Weights quantized at a time: without a native kernel, the operator's temporaries are many times as large."""

Scales = tuple[Tensor, ...]
"""Scales of the blocks, one of two kinds.

- ``(absmax,)``, shape (rows, blocks).
- ``(absmax, scale, phase, code, offset)``, bitsandbytes' nested statistics: the scales are quantized to 8 bits
  themselves, in runs of 256 that may cross rows. By row: uint8 codes (rows, blocks), the scales of the runs that the
  row touches (rows, runs), and the row's position in the first of them (rows, 1). For all rows: the values of the 256
  codes, and the mean.
"""


def packed_shapes(out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the packed weight, two weights a byte, and of its scales. Rows are padded to whole blocks."""
    blocks = -(-in_features // BLOCK_SIZE)
    return (out_features, blocks * BLOCK_SIZE // 2), (out_features, blocks)


def quantize_rows(weight: Tensor, path: str = "") -> tuple[Tensor, Tensor]:
    """Quantize rows of a weight. Rows are independent: any split of them gives the same bits.

    Args:
        weight: Shape (rows, in_features), of any floating dtype, on any device, ``meta`` included.
        path: Names the layer in the error.

    Returns:
        The packed weight, uint8, and its scales, bf16. ``packed_shapes`` gives their shapes.

    Raises:
        PaCAError: If a weight is not finite, or if bitsandbytes is too old for an HPU.
    """
    shapes = packed_shapes(*weight.shape)
    packed = torch.empty(shapes[0], dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(shapes[1], dtype=SCALE_DTYPE, device=weight.device)
    if weight.is_meta or weight.numel() == 0:
        return packed, absmax
    load_operators(weight.device)
    check_finite(weight, path)
    padding = 2 * packed.shape[1] - weight.shape[1]
    for chunk in _row_chunks(weight):
        rows = weight[chunk]
        rows = F.pad(rows if rows.dtype in KERNEL_DTYPES else rows.float(), (0, padding)).contiguous()
        codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(rows, BLOCK_SIZE, "nf4", torch.uint8)
        packed[chunk] = codes.view(len(rows), -1)
        absmax[chunk] = scales.view(len(rows), -1)
    return packed, absmax


def dequantize_rows(
    packed: Tensor, scales: Scales, in_features: int, dtype: torch.dtype, *, in_backward: bool = False
) -> Tensor:
    """Dequantize packed rows.

    Args:
        packed: Shape (rows, padded in_features / 2), uint8.
        scales: Scales of its blocks. The block size follows from the shapes.
        in_features: Length of a row without padding.
        dtype: Of the result.
        in_backward: Emit a different graph, so that torch.compile does not keep the forward's weight for the backward.

    Returns:
        A fresh tensor (for padded rows, a view of one), shape (rows, in_features).
    """
    load_operators(packed.device)
    absmax = scales[0].float() if len(scales) == 1 else _nested_absmax(*scales)
    rows, padded = packed.shape[0], 2 * packed.shape[1]
    weight = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.reshape(1, -1) if in_backward else packed.reshape(-1, 1),
        absmax.reshape(-1),
        padded // absmax.shape[1],
        "nf4",
        [rows, padded],
        dtype if dtype in KERNEL_DTYPES else torch.float32,
    )
    return weight[:, :in_features].to(dtype)


def squared_errors(weight: Tensor, path: str = "") -> Tensor:
    """Squared quantization error of each column, summed over the rows. The errors of several ranks' rows add up.

    Args:
        weight: Shape (rows, in_features).
        path: Names the layer in the error.

    Returns:
        Shape (in_features,), fp32.

    Raises:
        PaCAError: If a weight is not finite, or if bitsandbytes is too old for an HPU.
    """
    packed, absmax = quantize_rows(weight, path)
    errors = torch.zeros(weight.shape[1], device=weight.device)
    for rows in _row_chunks(weight):
        restored = dequantize_rows(packed[rows], (absmax[rows],), weight.shape[1], torch.float32)
        errors += (weight[rows].float() - restored).square().sum(0)
    return errors


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows with about ``CHUNK`` weights each."""
    step = max(1, CHUNK // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))


def _nested_absmax(absmax: Tensor, scale: Tensor, phase: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    """The scales that nested statistics stand for, shape (rows, blocks), fp32."""
    run = (phase.long() + torch.arange(absmax.shape[1], device=absmax.device)) // NESTED_BLOCK_SIZE
    return code[absmax.long()] * scale.gather(1, run) + offset


def check_finite(weight: Tensor, path: str) -> None:
    """Raise unless all values of a weight are finite.

    Raises:
        PaCAError: Naming the layer.
    """
    low, high = weight.aminmax()  # NaN if there is one, and no temporary
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        where = f" of {path!r}" if path else ""
        raise PaCAError(f"The weight{where} holds NaN or infinite values, which NF4 cannot store. Is the file damaged?")
