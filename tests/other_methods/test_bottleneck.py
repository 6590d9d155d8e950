"""Bottleneck adapters equal a plain reading of their papers' equations, with gradients, over several steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.other_methods.bottleneck import BottleneckAdapter, insert_bottlenecks
from tests.other_methods.plain_llama import plain_logits
from tests.tiny import tiny_llama

TOKENS = torch.randint(3, 384, (12, 10), generator=torch.Generator().manual_seed(0))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def by_the_equations(model: Any, placement: str, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """``y + W_up f(W_down y + b_down) + b_up``, with f as each paper's authors have it."""

    def adapter(path: str, y: Tensor) -> Tensor:
        w_down, b_down, w_up, b_up = (
            weights[f"model.layers.{path}.bottleneck.{name}"]
            for name in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        inner = y @ w_down.T + b_down
        gelu, relu = 0.5 * inner * (1 + torch.erf(inner / 2**0.5)), inner.clamp(min=0)
        inner = gelu if placement == "houlsby" else relu
        return y + inner @ w_up.T + b_up

    if placement == "pfeiffer":
        return plain_logits(model, ids, after_block=lambda n, h: adapter(str(n), h))
    return plain_logits(
        model,
        ids,
        after_attention=lambda n, y: adapter(f"{n}.self_attn", y),
        after_mlp=lambda n, y: adapter(f"{n}.mlp", y),
    )


@pytest.mark.parametrize(("placement", "count"), [("houlsby", 4), ("pfeiffer", 2)])
def test_equal_to_the_papers_equations_over_several_steps(placement: Any, count: int) -> None:
    model, plain = tiny_llama(), tiny_llama().requires_grad_(False)
    adapted = insert_bottlenecks(model, size=6, placement=placement)
    assert len(adapted.inserted) == count
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(own) == 4 * count
    theirs = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    optimizers = [torch.optim.AdamW(p.values(), lr=1e-2) for p in (own, theirs)]
    for batch in TOKENS.split(2):
        loss_of(model(input_ids=batch, use_cache=False).logits, batch).backward()
        loss_of(by_the_equations(plain, placement, theirs, batch), batch).backward()
        for name, parameter in own.items():
            assert parameter.grad is not None
            # Sums of matrix products in another order.
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in plain.parameters())


def test_starts_near_the_identity() -> None:
    torch.manual_seed(0)
    adapter = BottleneckAdapter(256, 32, "relu")
    for layer in (adapter.down, adapter.up):
        weight = layer.weight.detach()
        assert 0.008 < float(weight.std()) < 0.01  # cut off at two deviations
        assert float(weight.abs().max()) <= 0.02
        assert not layer.bias.any()
    hidden = torch.randn(2, 3, 256)
    torch.testing.assert_close(adapter.edit(hidden), hidden, rtol=0, atol=0.05)


def test_blocks_and_sublayers_of_any_module_by_name() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.fold = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fold(x + self.mix(x))

    class Model(nn.Module):
        class config:
            hidden_size = 8

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

    with pytest.raises(PaCAError, match=r"Model declares none\. Name their class"):
        insert_bottlenecks(Model())
    with pytest.raises(PaCAError, match=r"'blocks.0' has no attention or feed-forward layer of a known name"):
        insert_bottlenecks(Model(), block_classes=["Block"])
    with pytest.raises(PaCAError, match=r"'blocks.0' has no 'folt'; its modules are \['mix', 'fold'\]"):
        insert_bottlenecks(Model(), block_classes=["Block"], sublayers=["mix", "folt"])
    adapted = insert_bottlenecks(Model(), block_classes=["Block"], sublayers=["mix", "fold"])
    assert list(adapted.inserted) == [f"blocks.{n}.{name}.bottleneck" for n in (0, 1) for name in ("mix", "fold")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"placement": "parallel"}, "placement='parallel' is unknown"),
        ({"activation": "swish"}, "activation='swish' is unknown"),
    ],
)
def test_settings_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        insert_bottlenecks(tiny_llama(), **settings)
