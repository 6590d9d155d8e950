"""The Triton kernel that writes the trained columns of many layers in one launch.

It is imported where Triton is installed, as it is beside PyTorch's CUDA builds. ``TRITON_INTERPRET=1`` runs it on the
CPU.
"""

import triton
import triton.language as tl


@triton.jit
def write_tiles(
    table,
    tiles,
    factors,
    LENGTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
    BASE: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Write ``base + factor * delta`` into the selected columns of one tile of rows.

    Args:
        table: Shape (layers, LENGTH), int64: addresses of weight, base columns, delta and indices; rows; rank; stride
            of a row and of a column of the weight.
        tiles: Shape (programs, 2), int64: each program's layer and its first row.
        factors: Shape (layers, WIDTH): what the columns of each layer's delta are multiplied by.
        LENGTH: Of an entry.
        HEIGHT: Rows of a tile.
        WIDTH: The rank, rounded up to a power of two.
        WEIGHT: Element type of the weight.
        BASE: Element type of the base columns.
        DELTA: Element type of the delta, in which the sum is computed.
    """
    program = tl.program_id(0)
    layer = tl.load(tiles + 2 * program)
    entry = table + layer * LENGTH
    weight = tl.load(entry).to(tl.pointer_type(WEIGHT))
    base = tl.load(entry + 1).to(tl.pointer_type(BASE))
    delta = tl.load(entry + 2).to(tl.pointer_type(DELTA))
    indices = tl.load(entry + 3).to(tl.pointer_type(tl.int64))
    rank = tl.load(entry + 5)
    row = tl.load(tiles + 2 * program + 1) + tl.arange(0, HEIGHT)
    number = tl.arange(0, WIDTH)
    selected = number < rank
    inside = (row < tl.load(entry + 4))[:, None] & selected[None, :]
    source = row[:, None] * rank + number[None, :]
    value = tl.fma(
        tl.load(delta + source, mask=inside, other=0.0),
        tl.broadcast_to(tl.load(factors + layer * WIDTH + number)[None, :], [HEIGHT, WIDTH]),
        tl.load(base + source, mask=inside, other=0.0).to(DELTA),
    )
    column = tl.load(indices + number, mask=selected, other=0)
    target = weight + row[:, None] * tl.load(entry + 6) + column[None, :] * tl.load(entry + 7)
    tl.store(target, value.to(WEIGHT, fp_downcast_rounding="rtne"), mask=inside)
