"""The mean loss over tokens."""

import pytest
import torch

from paca_lightning.tasks.metrics import MeanTokenLoss


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda module: module.bfloat16(), torch.float32),
        (lambda module: module.to(torch.float16), torch.float32),
        (lambda module: module.to(torch.float64), torch.float64),
        (lambda module: module.to_empty(device="cpu"), torch.float32),
    ],
    ids=["bfloat16", "float16", "float64", "to_empty"],
)
def test_the_metric_keeps_its_state_in_fp32_or_wider_wherever_it_moves(cast, dtype):
    metric = MeanTokenLoss()
    metric.update(torch.tensor(1000.5), torch.tensor(3))
    cast(torch.nn.ModuleList([metric]))
    assert (metric.total.dtype, metric.tokens.dtype) == (dtype, torch.int64)
    assert metric.compute() == torch.tensor(1000.5 / 3, dtype=dtype)
    metric.reset()
    assert (metric.total.dtype, metric.total.item(), metric.tokens.item()) == (dtype, 0, 0)
