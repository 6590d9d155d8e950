"""Values on which the ranks of a run agree, at the cost of one small collective."""

import torch.distributed as dist
from torch import Tensor


def host_group() -> dist.ProcessGroup | None:
    """A group of all ranks that reduces tensors in host memory; None in a run of one process. Collective.

    It is the default group if that has a backend for host memory. Otherwise it is a new gloo group, which is the
    caller's to give to :func:`end_group`.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if "cpu:gloo" in dist.get_backend_config():
        return dist.group.WORLD
    return dist.new_group(backend="gloo")


def end_group(group: dist.ProcessGroup | None) -> None:
    """End a group of :func:`host_group`, unless it is the default one."""
    if group is not None and dist.is_initialized() and group is not dist.group.WORLD:
        dist.destroy_process_group(group)


def sum_of_ranks(own: Tensor) -> Tensor:
    """The sum over all ranks of the default group, written into ``own``. In a run of one process it stays as it is.

    One collective, for which the host does not wait: Lightning's ``Strategy.reduce`` adds a barrier.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(own)
    return own


def mean_of_ranks(own: Tensor) -> Tensor:
    """The mean of floating-point numbers over all ranks, as :func:`sum_of_ranks`."""
    own = sum_of_ranks(own)
    return own.div_(dist.get_world_size()) if dist.is_available() and dist.is_initialized() else own


def highest(own: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The highest value of all ranks, written into ``own``, without a barrier as in :func:`sum_of_ranks`.

    Args:
        own: A value in the memory that the group's backend reduces.
        group: Default: the default group.
    """
    dist.all_reduce(own, dist.ReduceOp.MAX, group=group)
    return own
