"""Ranks agree on numbers in host memory, whatever backend their devices use."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from paca_lightning.strategies.agreement import end_group, highest, host_group, mean_of_ranks, sum_of_ranks
from tests.distributed_launch import launch


def agree(backends: str) -> tuple[bool, int, bool]:
    """Whether the group is the default one, what two ranks agree on, and whether the group is there after its end."""
    dist.init_process_group("gloo")
    with mock.patch.object(dist, "get_backend_config", return_value=backends):
        group = host_group()
    agreed = int(highest(torch.tensor([15, 2][dist.get_rank()]), group))
    end_group(group)
    return group is dist.group.WORLD, agreed, group in dist.distributed_c10d._world.pg_map


@pytest.mark.distributed
@pytest.mark.parametrize("backends", ["cpu:gloo,cuda:nccl", "cuda:nccl"])
def test_two_ranks_agree(backends: str) -> None:
    has_host_backend = "cpu" in backends
    assert launch(agree, 2, backends) == [(has_host_backend, 15, has_host_backend)] * 2


def test_one_process_needs_no_group() -> None:
    assert host_group() is None
    end_group(None)


def sums() -> tuple[float, float]:
    dist.init_process_group("gloo")
    with mock.patch.object(dist, "barrier", side_effect=AssertionError("the host waits")):
        own = torch.tensor(float(dist.get_rank() + 1))
        return float(sum_of_ranks(own.clone())), float(mean_of_ranks(own.clone()))


@pytest.mark.distributed
def test_sums_and_means_of_two_ranks() -> None:
    assert launch(sums, 2) == [(3.0, 1.5)] * 2


def test_sums_and_means_of_one_process() -> None:
    assert float(sum_of_ranks(torch.tensor(3.0))) == float(mean_of_ranks(torch.tensor(3.0))) == 3.0
