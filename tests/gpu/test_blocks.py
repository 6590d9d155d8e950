"""What is done to whole blocks on the GPU: selective checkpointing beside fused attention, and torch.compile."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from paca_lightning import PaCAConfig, apply_paca, paca_layers
from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from tests.gpu.test_step import CONFIGS, converted, loss_of, optimizer_of, step, tokens
from tests.tiny import tiny_llama

ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def gradients(model: nn.Module, ids: Tensor, backend: SDPBackend, recompute: str | None) -> list[Tensor]:
    """Gradients of a copy of a model; its attention drops with the same random numbers each time."""
    model = copy.deepcopy(model)
    if recompute is not None:
        checkpoint_blocks(find_blocks(model), selective=recompute == "selective")
    torch.manual_seed(1)
    with sdpa_kernel(backend):
        loss_of(model, ids).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


# What a CPU has not: memory-efficient attention, and dropout in flash attention.
FUSED = [
    pytest.param(
        backend, dropout, marks=pytest.mark.cuda_only if backend != "math" and (dropout or backend != "flash") else ()
    )
    for backend in ATTENTION
    for dropout in (0.0, 0.1)
]


@pytest.mark.parametrize(("backend", "dropout"), FUSED)
@pytest.mark.parametrize("recompute", ["selective", "blocks"])
def test_checkpointing_changes_no_gradient(device: str, recompute: str, backend: str, dropout: float) -> None:
    model = tiny_llama(attention_dropout=dropout, hidden_size=128).to(device, torch.bfloat16).train()
    apply_paca(model, PaCAConfig(r=4))
    ids = tokens(device)
    plain, ours = (gradients(model, ids, ATTENTION[backend], how) for how in (None, recompute))
    assert plain
    for expected, found in zip(plain, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("mode", ["default", pytest.param("max-autotune", marks=pytest.mark.cuda_only)])
def test_compiled_blocks_have_no_graph_break_and_are_compiled_once(device: str, mode: str, config: PaCAConfig) -> None:
    torch.compiler.reset()
    counters.clear()
    model = converted(device, config)
    plain = copy.deepcopy(model)
    for block in find_blocks(model):
        block.compile(mode=mode, fullgraph=True)
    optimizers = [optimizer_of(each, device) for each in (model, plain)]
    step(model, optimizers[0], tokens(device))
    step(plain, optimizers[1], tokens(device))
    compiled_once = counters["stats"]["unique_graphs"]
    assert compiled_once >= 1
    for number in range(1, 5):
        pairs = zip((model, plain), optimizers, strict=True)
        loss, expected = (step(*pair, tokens(device, number)) for pair in pairs)
        assert float(loss) == pytest.approx(float(expected), rel=2e-2)  # bf16, fused otherwise
    assert counters["stats"]["unique_graphs"] == compiled_once
    assert not counters["graph_break"]
    assert any(bool(layer.paca_delta.any()) for _, layer in paca_layers(model))
