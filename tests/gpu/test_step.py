"""A training step on the GPU: no host synchronization, CUDA graphs, skipped steps, constant memory, bitwise resume."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAConfig, apply_paca, attach, paca_layers
from tests.tiny import tiny_llama

CONFIGS = {"dense": PaCAConfig(r=4, alpha=6), "nf4": PaCAConfig(r=4, alpha=6, quantize="nf4")}


def converted(device: str, config: PaCAConfig, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = tiny_llama().to(device, dtype)
    apply_paca(model, config)
    return model


def optimizer_of(model: nn.Module, device: str, **settings: object) -> torch.optim.Optimizer:
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(deltas, lr=1e-2, **settings)  # type: ignore[arg-type]
    attach(optimizer, model)
    return optimizer


def tokens(device: str, number: int = 0) -> Tensor:
    return torch.randint(0, 384, (2, 32), generator=torch.Generator().manual_seed(number)).to(device)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    loss = loss_of(model, ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda_only
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_never_waits_for_the_device(device: str, config: PaCAConfig, fused: bool) -> None:
    model = converted(device, config)
    optimizer, ids = optimizer_of(model, device, fused=fused), tokens(device)
    for _ in range(2):  # state is allocated, kernels are compiled and checked
        step(model, optimizer, ids)
    with no_synchronization():
        step(model, optimizer, ids)


@pytest.mark.cuda_only
def test_forward_and_backward_can_be_captured_in_a_cuda_graph(device: str) -> None:
    model = converted(device, CONFIGS["dense"])
    plain, ids = copy.deepcopy(model), tokens(device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_of(model, ids).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(model, ids)
        loss.backward()
    optimizers = [optimizer_of(each, device, lr=1e-2) for each in (model, plain)]
    for number in range(3):
        new = tokens(device, number)
        ids.copy_(new)
        graph.replay()
        expected = loss_of(plain, new)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
        for optimizer in optimizers:
            optimizer.step()
        plain.zero_grad()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_that_overflows_is_skipped_and_the_next_ones_train(device: str, config: PaCAConfig) -> None:
    """What Lightning's ``16-mixed`` does, with clipping."""
    model = converted(device, config, torch.float32)
    optimizer, ids = optimizer_of(model, device), tokens(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    for number in range(12):
        with torch.autocast(device, torch.float16):
            loss = loss_of(model, ids)
        scaler.scale(loss if number else loss * float("inf")).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number == 0:
            assert scaler.get_scale() == 2.0**9
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert losses[-1] < losses[1] - 0.3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_resumed_run_is_bitwise_the_same(device: str, config: PaCAConfig) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = converted(device, config)
        optimizer = optimizer_of(model, device)
        for number in range(3):
            step(model, optimizer, tokens(device, number))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        resumed = converted(device, config)
        resumed.load_state_dict(saved[0])
        other = optimizer_of(resumed, device)
        other.load_state_dict(saved[1])
        for number in range(3, 6):
            losses = [step(*pair, tokens(device, number)) for pair in ((model, optimizer), (resumed, other))]
            assert torch.equal(*losses)
    finally:
        torch.use_deterministic_algorithms(False)
    for (_, ours), (_, theirs) in zip(paca_layers(model), paca_layers(resumed), strict=True):
        assert torch.equal(ours.paca_delta, theirs.paca_delta)
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.cuda_only
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_memory_does_not_grow_over_200_steps(device: str, config: PaCAConfig) -> None:
    model = converted(device, config)
    optimizer, ids = optimizer_of(model, device), tokens(device)
    for _ in range(10):
        step(model, optimizer, ids)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(200):
        step(model, optimizer, ids)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
