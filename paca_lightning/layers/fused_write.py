"""Writing the columns of many layers with one kernel launch for each kind of layer, on a GPU.

Layer by layer, a write-back is three launches a layer: sum, cast, copy. Its data are small, so on a GPU hundreds of
launches of a few microseconds are most of what it costs.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from paca_lightning.core.dtensor import local
from paca_lightning.core.private.torch import version_of
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.columns import check_not_parametrized, trained_columns
from paca_lightning.layers.write_watch import note_written

ENTRY = 8
"""Numbers in a layer's entry of the kernel's table: four addresses, rows, rank, and the weight's two strides."""

ROWS = 64
"""Rows of a weight that one program of the kernel writes."""


@dataclass(frozen=True)
class ColumnWrite:
    """What the write of one layer reads and writes.

    Attributes:
        weight: Shape (rows, in_features), of any strides.
        base: Base columns, shape (rows, r), contiguous.
        delta: Shape (rows, r), contiguous, fp32 or fp64.
        indices: Columns of the weight, shape (r,), int64.
        factor: What the delta is multiplied by: one number, or one for each column, shape (r,).
    """

    weight: Tensor
    base: Tensor
    delta: Tensor
    indices: Tensor
    factor: float | Tensor

    @classmethod
    def of(cls, layer: PaCALayer) -> "ColumnWrite":
        """The write of a layer, on this rank's rows."""
        base, delta = local(layer.paca_base_columns).detach(), local(layer.paca_delta).detach()
        return cls(layer._rows(), base, delta, layer.paca_indices, layer.factor)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers of one kind are written by one launch: device, dtypes, and the rank, rounded up to a power of two."""
        width = 1 << (self.indices.numel() - 1).bit_length()
        return self.weight.device, self.weight.dtype, self.base.dtype, self.delta.dtype, width

    def expected(self) -> Tensor:
        """The trained columns in plain operators, shape (rows, r): the reference of the kernel."""
        return trained_columns(self.base, self.delta, self.factor).to(self.weight.dtype)


class FusedWrite:
    """Writes the columns of layers of one kind with one launch.

    The addresses are kept on the device, so a launch copies nothing to it and does not wait.

    Args:
        writes: All of one :attr:`ColumnWrite.kind`.
    """

    def __init__(self, writes: Sequence[ColumnWrite]) -> None:
        self._writes = list(writes)
        device, *_, self._width = writes[0].kind
        table = [
            [tensor.data_ptr() for tensor in (w.weight, w.base, w.delta, w.indices)]
            + [w.weight.shape[0], w.indices.numel(), *w.weight.stride()]
            for w in writes
        ]
        tiles = [(layer, row) for layer, w in enumerate(writes) for row in range(0, w.weight.shape[0], ROWS)]
        factors = torch.zeros(len(writes), self._width, dtype=writes[0].delta.dtype, device=device)
        for row, write in zip(factors, writes, strict=True):
            row[: write.indices.numel()] = write.factor
        self._arguments = (torch.tensor(table).to(device), torch.tensor(tiles).to(device), factors)

    def launch(self) -> None:
        """Write all columns."""
        import triton.language as tl

        from paca_lightning.layers.column_kernel import write_tiles

        first = self._writes[0]
        types = [
            getattr(tl, str(each.dtype).removeprefix("torch.")) for each in (first.weight, first.base, first.delta)
        ]
        with torch.cuda.device_of(first.weight):  # Triton launches on the current one
            write_tiles[(len(self._arguments[1]),)](*self._arguments, ENTRY, ROWS, self._width, *types)
        # The kernel writes behind PyTorch's back. A backward that saved an older weight must notice.
        torch.autograd.graph.increment_version([write.weight for write in self._writes])

    def agrees(self) -> bool:
        """Whether the weights have what plain operators compute, to one rounding. It waits for the device.

        A compiler may round a product before it is added, or not.
        """
        for write in self._writes:
            written, expected = write.weight.index_select(1, write.indices).double(), write.expected().double()
            size = write.base.double().abs() + (write.factor * write.delta).double().abs()
            limit = torch.finfo(write.weight.dtype).eps * size + torch.finfo(write.weight.dtype).tiny
            if bool(((written - expected).abs() > limit).any()):
                return False
        return True


def copied_from(layer: PaCALayer) -> tuple[int, ...]:
    """What a fused write has copied of a layer: the addresses of its tensors, and which version of its steps."""
    tensors = (layer.base, layer.paca_base_columns, layer.paca_delta, layer.paca_indices, layer.paca_scale)
    addresses = [0 if tensor is None else local(tensor).data_ptr() for tensor in tensors]
    return (*addresses, 0 if layer.paca_scale is None else version_of(layer.paca_scale))


@cache
def can_fuse(device: torch.device) -> bool:
    """Whether the kernel runs on a device: CUDA or ROCm, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None


class ColumnWriter:
    """Writes the columns of many layers: with :class:`FusedWrite` on a GPU, elsewhere layer by layer.

    The first fused write is compared with the plain one. If it differs, or its kernel cannot be compiled, a warning
    says so, and the layers are written one by one from then on.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[PaCALayer]) -> None:
        self._layers = list(layers)
        self._trusted = True
        self._copied: list[tuple[int, ...]] = []
        self._fused: list[FusedWrite] = []

    def write(self) -> None:
        """Write all columns."""
        together = [
            layer
            for layer in self._layers
            # The kernel writes columns of matrices, and stacked experts are none.
            if layer.keeps_weight and layer.paca_enabled and layer.base.dim() == 2 and can_fuse(layer.base.device)
        ]
        if not together:
            self._fused, self._copied = [], []  # a model that left the GPU must not stay there
        written = set(together) if together and self._trusted and self._write_together(together) else set()
        for layer in self._layers:
            if layer not in written:
                layer.write_columns()

    @torch.no_grad()
    def _write_together(self, layers: list[PaCALayer]) -> bool:
        """Write layers with one launch for each kind. Returns whether that can be trusted."""
        for layer in layers:
            layer._reshard()
        copied = [copied_from(layer) for layer in layers]
        moved = copied != self._copied
        for layer in layers if moved else ():
            check_not_parametrized(layer, layer.base, layer.paca_path)
        try:
            if moved:
                ordered = sorted(map(ColumnWrite.of, layers), key=lambda write: str(write.kind))
                self._fused = [FusedWrite(list(group)) for _, group in groupby(ordered, key=lambda write: write.kind)]
                self._copied = copied
            for fused in self._fused:
                fused.launch()
            problem = "" if not moved or all(fused.agrees() for fused in self._fused) else "it writes other values"
        except Exception as error:  # of whichever compiler Triton has for the device
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self._trusted = False
            warnings.warn(
                f"The fused write-back does not work on {layers[0].base.device} ({problem}). Layers are written one by "
                "one, which costs a few milliseconds a step. Please report it.",
                stacklevel=2,
            )
            return False
        for layer in layers:
            note_written(layer, layer.paca_delta)
        return True
