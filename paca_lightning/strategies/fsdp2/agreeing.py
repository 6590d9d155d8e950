"""Failures of one rank, raised on all, so that none waits for a rank that has stopped."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from paca_lightning.core.errors import PaCAError

T = TypeVar("T")


def raise_on_all_ranks(failure: PaCAError | None) -> None:
    """Raise the failure of any rank on all ranks. Collective.

    Raises:
        PaCAError: That of the first rank that has one.
    """
    if not dist.is_initialized():
        failures = [failure and str(failure)]
    else:
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure and str(failure))
    if first := next((message for message in failures if message), None):
        raise PaCAError(first) from failure


def on_all_ranks(work: Callable[[], T]) -> T:
    """What a function returns, if it succeeds on all ranks. Collective.

    Raises:
        PaCAError: On all ranks, if it does so on one.
    """
    failure: PaCAError | None = None
    try:
        result = work()
    except PaCAError as error:
        failure = error
    raise_on_all_ranks(failure)
    return result
