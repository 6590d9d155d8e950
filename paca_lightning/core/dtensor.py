"""Tensors that may be sharded: this rank's rows, the whole, and which rank writes files."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor's rows lie on several ranks."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_row(tensor: Tensor) -> int:
    """Number of the first row of a tensor that this rank holds: 0 if it is not sharded."""
    if not is_sharded(tensor):
        return 0
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]  # of torch.distributed.checkpoint
    return int(chunk.offsets[0])


def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded: each rank takes its rows, without communication."""
    if hasattr(tensor, "to_local"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def sharded_like(rows: Tensor, other: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of a given shape of which this rank holds ``rows``: those that it holds of ``other``.

    Args:
        rows: Shape (rows of this rank, ...).
        other: Sharded by rows or not. If not, ``rows`` is the whole tensor.
        shape: Shape of the whole tensor, with as many rows as ``other``.
    """
    if not hasattr(other, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(other, DTensor)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, other.device_mesh, other.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def gathered(tensor: Tensor) -> Tensor:
    """A whole tensor on its device, gathered if it is sharded (then call it on every rank)."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor in host memory, gathered if it is sharded (then call it on every rank)."""
    return gathered(tensor).cpu()


def is_first_rank() -> bool:
    """Whether this process writes files: the first of several, or the only one."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
