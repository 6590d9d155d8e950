"""Torch's communication hooks under Lightning's DDP, with PaCA's deltas on two ranks."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, paca_layers
from paca_lightning.strategies import CompressedDDPStrategy
from tests.distributed_launch import launch
from tests.distributed_training import TinyChat

STEPS = 4
HOOKS: list[dict[str, Any] | None] = [
    None,  # plain DDP
    {"compression": "power_sgd", "rank": 1, "start": STEPS},
    {"compression": "power_sgd", "rank": 1, "start": 2},
    {"compression": "fp16"},
]


def deltas_with_each_hook() -> list[list[Tensor]]:
    """The deltas of this rank after a few steps, and how many values PowerSGD sent for how many."""
    torch.set_num_threads(1)
    results = []
    for hook in HOOKS:
        torch.manual_seed(0)
        model = TinyChat(in_init=True)
        strategy = DDPStrategy() if hook is None else CompressedDDPStrategy(**hook)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_steps=STEPS,
            callbacks=[PaCAStrategy(PaCAConfig(r=4))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model)
        results.append([layer.paca_delta.detach().clone() for _, layer in paca_layers(model)])
        if hook == HOOKS[2]:
            _, before, after = strategy.power_sgd.compression_stats()  # type: ignore[union-attr]
            results[-1].append(torch.tensor([before, after]))
    return results


@pytest.mark.distributed
def test_ranks_agree_and_compressed_gradients_train_nearly_as_whole_ones() -> None:
    first, second = launch(deltas_with_each_hook, 2)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    plain, late, power, rounded = first
    assert all(torch.equal(a, b) for a, b in zip(plain, late, strict=True))  # PowerSGD has not begun
    before, after = power.pop().tolist()
    assert 0 < 2 * after < before
    assert not all(torch.equal(a, b) for a, b in zip(plain, power, strict=True))
    for deltas in (power, rounded):
        distance = sum((a - b).norm() for a, b in zip(plain, deltas, strict=True))
        assert 0 < distance < sum(a.norm() for a in plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"compression": "int8"}, "'int8' is none of power_sgd"), ({"start": 1}, "start=1"), ({"rank": 0}, "rank=0")],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        CompressedDDPStrategy(**settings)


def test_bf16_on_cpus_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy=CompressedDDPStrategy("bf16"), logger=False)
    with pytest.raises(PaCAError, match="on GPUs alone"):
        trainer.strategy.setup_environment()
