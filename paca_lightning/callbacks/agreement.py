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


def highest(own: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The highest value of all ranks, written into ``own``.

    One collective: Lightning's ``Strategy.reduce`` adds a barrier, for which the host waits.

    Args:
        own: A value in the memory that the group's backend reduces.
        group: Default: the default group.
    """
    dist.all_reduce(own, dist.ReduceOp.MAX, group=group)
    return own
