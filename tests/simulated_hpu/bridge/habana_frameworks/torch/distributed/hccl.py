"""The simulated ``hccl``: registers the process-group backend when imported, as the real module does."""

import os

import torch.distributed as dist

from habana_frameworks.torch import _device


def _create(options: "dist.distributed_c10d._DistributedBackendOptions", _: object = None) -> dist.Backend:
    store = dist.PrefixStore("hccl", options.store)
    return _device.hccl_over(dist.ProcessGroupGloo(store, options.group_rank, options.group_size, options.timeout))


def initialize_distributed_hpu(world_size: int, rank: int, local_rank: int) -> tuple[int, int, int]:
    """Binds this process to the card of its local rank."""
    os.environ["HLS_MODULE_ID"] = str(local_rank)
    return world_size, rank, local_rank


dist.Backend.register_backend("hccl", _create, extended_api=True, devices=["hpu"])
