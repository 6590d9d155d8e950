"""What FSDP2 units gather, when, and in which dtypes, in plain training loops."""

import copy
import os
import warnings
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor.debug import CommDebugMode

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach, disable_paca, paca_layers
from paca_lightning.activation_checkpointing.blocks import find_blocks
from paca_lightning.strategies.fsdp2.sharding import RESHARDS_INTEGERS, ShardingOptions, shard
from tests.distributed_launch import launch
from tests.distributed_training import whole_deltas
from tests.tiny import tiny_llama

IDS = torch.arange(48).view(3, 16) * 7 % 384
CONFIGS = {"dense": PaCAConfig(r=4, alpha=8), "NF4": PaCAConfig(r=4, alpha=8, quantize="nf4")}
RESHARD: dict[str, bool | int] = {"freed": True, "kept": False, "a share kept": 2}
REFUSED = set() if RESHARDS_INTEGERS else {("a share kept", "NF4")}


def converted(config: PaCAConfig, reshard: bool | int) -> nn.Module:
    """A tiny Llama, sharded over the ranks of this launch if there are several."""
    model = tiny_llama(intermediate_size=97)
    apply_paca(model, config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        options = ShardingOptions(reshard_after_forward=reshard)
        shard(model, init_device_mesh("cpu", (world_size,)), find_blocks(model), options)
    return model


def train_against_the_base_model(config: PaCAConfig, reshard: bool | int) -> dict[str, Any]:
    """Three steps with the base model as reference. Some forwards are not followed by a backward."""
    model = converted(config, reshard)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    attach(optimizer, model)
    losses = []
    ids = IDS[:1]
    for _ in range(3):
        with disable_paca(model), torch.no_grad():
            before = model(input_ids=ids).logits
        logits = model(input_ids=ids).logits
        with disable_paca(model), torch.no_grad():
            reference = model(input_ids=ids).logits
            again = model(input_ids=ids).logits
        assert torch.equal(reference, again)
        assert torch.equal(reference, before)
        loss = (logits - reference - 0.1).square().mean() + logits.logsumexp(-1).mean()
        loss.backward()
        with torch.no_grad():  # leaves parameters gathered, which the step makes out of date
            model(input_ids=ids)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*had no gradient in the first step")
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        final = model(input_ids=ids).logits
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {"losses": losses, "final": final, "deltas": whole_deltas(model)}


def all_gathers(reshard: bool | int) -> list[int]:
    """Number of all-gathers in each of two training steps."""
    model = converted(CONFIGS["dense"], reshard)
    counts = []
    for _ in range(2):
        with CommDebugMode() as mode:
            model(input_ids=IDS, labels=IDS).loss.backward()
        by_operator = {str(operator): int(count) for operator, count in mode.get_comm_counts().items()}
        counts.append(sum(count for operator, count in by_operator.items() if "allgather" in operator.replace("_", "")))
    return counts


def on_four_ranks() -> dict[str, Any]:
    return {
        "gathers": {name: all_gathers(reshard) for name, reshard in RESHARD.items()},
        "trained": {
            (config, name): train_against_the_base_model(CONFIGS[config], reshard)
            for config in CONFIGS
            for name, reshard in RESHARD.items()
            if (name, config) not in REFUSED
        },
    }


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, Any]:
    return launch(on_four_ranks, 4)[0]


@pytest.mark.distributed
def test_the_backward_gathers_nothing_that_was_kept(four_ranks: dict[str, Any]) -> None:
    once = 5  # embeddings, two blocks, the norm behind them, the head
    twice = once + 4  # the head's forward is followed by its backward
    assert four_ranks["gathers"] == {"freed": [twice] * 2, "kept": [once] * 2, "a share kept": [twice] * 2}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(
            *(name, config),
            marks=pytest.mark.skipif((name, config) in REFUSED, reason="PyTorch before 2.12 cannot, so it is refused"),
        )
        for config in CONFIGS
        for name in RESHARD
    ],
)
def test_columns_are_written_to_the_shards(four_ranks: dict[str, Any], config: str, name: str) -> None:
    sharded, one = four_ranks["trained"][config, name], train_against_the_base_model(CONFIGS[config], True)
    assert one["losses"][0] > one["losses"][-1]
    assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-6)
    torch.testing.assert_close(sharded["final"], one["final"], rtol=0, atol=1e-5)
    for path, delta in one["deltas"].items():
        torch.testing.assert_close(sharded["deltas"][path], delta, rtol=0, atol=1e-5)


def test_a_share_of_packed_weights_is_refused_where_pytorch_cannot_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paca_lightning.strategies.fsdp2.sharding.RESHARDS_INTEGERS", False)
    model = tiny_llama()
    apply_paca(model, CONFIGS["NF4"])
    with pytest.raises(PaCAError, match=r"q_proj\..*' is packed.*Set reshard_after_forward to true or false"):
        shard(model, Mock(), find_blocks(model), ShardingOptions(reshard_after_forward=2))  # before it uses the mesh


def adopted(*, nested: bool) -> nn.Sequential:
    """Two converted layers that bitsandbytes quantized. Their scales cannot be represented in bf16."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((128, 192), (192, 130)):
        dense = nn.Linear(inputs, outputs)
        layer = Linear4bit(inputs, outputs, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32)
        layer.load_state_dict(dense.state_dict())
        layers.append(layer.to("cpu"))
    model = nn.Sequential(nn.Sequential(layers[0], nn.LayerNorm(192), nn.ReLU(), layers[1]))
    model.requires_grad_(False)
    apply_paca(model, PaCAConfig(r=4, alpha=8))
    with torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.normal_(std=0.05)
    return model


def computed(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients for one input, and the scales that the forward uses."""
    seen: list[Tensor] = []
    for _, layer in paca_layers(model):
        layer.register_forward_pre_hook(lambda layer, _: seen.extend(s.detach().clone() for s in layer.scales))
    output = model(torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(dtype))
    output.float().square().sum().backward()
    deltas = [layer.paca_delta.grad for _, layer in paca_layers(model)]
    whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in deltas if grad is not None]
    return [output.detach(), *whole, *seen]


def computed_sharded(nested: bool, dtype: torch.dtype) -> list[Tensor]:
    model = adopted(nested=nested)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    shard(model, init_device_mesh("cpu", (2,)), [model[0]], ShardingOptions(mixed_precision=policy))
    return computed(model, dtype)


def on_two_ranks() -> dict[Any, list[Tensor]]:
    return {(nested, dtype): computed_sharded(nested, dtype) for nested in (False, True) for dtype in DTYPES}


DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def mixed() -> dict[Any, list[Tensor]]:
    return launch(on_two_ranks, 2)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_policy_does_not_narrow_scales(mixed: dict[Any, list[Tensor]], nested: bool, dtype: torch.dtype) -> None:
    model = adopted(nested=nested)
    wide = [s for _, layer in paca_layers(model) for s in layer.scales if s.dtype == torch.float32]
    assert wide
    assert not all(torch.equal(scale.to(dtype).float(), scale) for scale in wide)
    expected = computed(copy.deepcopy(model).to(dtype), dtype)
    found = mixed[nested, dtype]
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value, other)
