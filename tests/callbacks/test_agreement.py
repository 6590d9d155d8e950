"""Ranks agree on numbers in host memory, whatever backend their devices use."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from paca_lightning.callbacks.agreement import end_group, highest, host_group
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
