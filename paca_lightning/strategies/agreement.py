"""Values on which the ranks of a run agree, at the cost of one small collective."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from paca_lightning.core.dtensor import is_first_rank
from paca_lightning.core.errors import PaCAError

T = TypeVar("T")


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def host_group() -> dist.ProcessGroup | None:
    """A group of all ranks that reduces tensors in host memory; None in a run of one process. Collective.

    It is the default group if that has a backend for host memory. Otherwise it is a new gloo group, which is the
    caller's to give to :func:`end_group`.
    """
    if _ranks() == 1:
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
    if _ranks() > 1:
        dist.all_reduce(own)
    return own


def mean_of_ranks(own: Tensor) -> Tensor:
    """The mean of floating-point numbers over all ranks, as :func:`sum_of_ranks`."""
    return sum_of_ranks(own).div_(_ranks())


def highest(own: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The highest value of all ranks, written into ``own``, without a barrier as in :func:`sum_of_ranks`.

    Args:
        own: A value in the memory that the group's backend reduces.
        group: Default: the default group.
    """
    dist.all_reduce(own, dist.ReduceOp.MAX, group=group)
    return own


def from_first_rank(work: Callable[[], T]) -> T:
    """What a function returns on the first rank, which alone runs it. Collective: the others wait for it.

    Returns:
        The same on all ranks. It is pickled for the others.

    Raises:
        PaCAError: On all ranks, if the function does so.
    """
    outcome: list[Any] = [None, None]  # result and message
    failure: PaCAError | None = None
    if is_first_rank():
        try:
            outcome[0] = work()
        except PaCAError as error:
            failure, outcome[1] = error, str(error)
    if _ranks() > 1:
        dist.broadcast_object_list(outcome)
    result: T = outcome[0]
    if outcome[1] is not None:
        raise PaCAError(outcome[1]) from failure
    return result
