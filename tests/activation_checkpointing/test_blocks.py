"""What a checkpointed block is called with."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paca_lightning.activation_checkpointing.blocks import CACHES, checkpoint_blocks


class Caching(nn.Linear):
    """A block that appends to the key-value cache that it is given."""

    def forward(self, hidden: Tensor, **caches: Any) -> Tensor:
        for cache in caches.values():
            if cache is not None:
                cache.append(hidden)
        return super().forward(hidden)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_never_appended_to_twice(name: str) -> None:
    """Under transformers 5.24, which calls it ``cache``, the recomputation attended to everything twice."""
    block, cache = Caching(2, 2), []
    checkpoint_blocks([block])
    block(torch.ones(1, 2), **{name: cache}).sum().backward()
    assert cache == []
