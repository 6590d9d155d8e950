"""Parity with a plain layer of the same weight: results bitwise, the delta's gradient as a masked gradient."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paca_lightning import PaCALinear
from tests.layers.reference import IN, KINDS, OUT, ROUNDING, column_gradient_of, loss_of, pair_of, relative

Run = Callable[[nn.Module, Tensor], Tensor]


def eager(module: nn.Module, input: Tensor) -> Tensor:
    return module(input)


def compiled(module: nn.Module, input: Tensor) -> Tensor:
    return torch.compile(module, fullgraph=True, backend="aot_eager")(input)


def autocast(module: nn.Module, input: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(input)


def autocast_fp16(module: nn.Module, input: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return module(input)


def checkpointed(module: nn.Module, input: Tensor) -> Tensor:
    return checkpoint(module, input, use_reentrant=False)


RUNS: tuple[Run, ...] = (eager, compiled, autocast, autocast_fp16, checkpointed)
SHAPES = {"1-D": (IN,), "2-D": (7, IN), "3-D": (2, 5, IN)}


def cases() -> Iterator[object]:
    """All combinations, but compilations, which are slow, of the dense layer mostly."""
    for kind in KINDS:
        for dtype in ROUNDING:
            for bias in (True,) if kind == "transposed" else (True, False):
                for name, shape in SHAPES.items():
                    for run in RUNS:
                        if run is not compiled or kind == "dense" or (bias and name == "3-D"):
                            words = (kind, str(dtype).removeprefix("torch."), "bias" if bias else "no bias", name)
                            yield pytest.param(kind, dtype, bias, shape, run, id="-".join((*words, run.__name__)))


@pytest.mark.parametrize(("kind", "dtype", "bias", "shape", "run"), list(cases()))
def test_parity_with_a_masked_dense_gradient(
    kind: str, dtype: torch.dtype, bias: bool, shape: tuple[int, ...], run: Run
) -> None:
    if run is compiled:
        torch.compiler.reset()
    layer, twin = pair_of(kind, dtype, bias)
    results = []
    for module in (layer, twin):
        torch.manual_seed(1)
        input = torch.randn(shape, dtype=dtype, requires_grad=True)
        output = run(module, input)
        loss_of(output).backward()
        results.append((output, input.grad))
    (output, input_grad), (expected_output, expected_input_grad) = results

    rounding = max(ROUNDING[output.dtype], ROUNDING[dtype])
    assert output.dtype == expected_output.dtype
    # NF4's weight is put together in the dtype to compute in. While compiling, the scaling is a tensor.
    narrowed = run in (autocast, autocast_fp16) and dtype in (torch.float16, torch.bfloat16)
    if kind == "nf4" and (narrowed or run is compiled):
        assert relative(output, expected_output) <= rounding
        assert relative(input_grad, expected_input_grad) <= rounding
    else:
        assert torch.equal(output, expected_output)  # bitwise: it is the same matrix product
        assert torch.equal(input_grad, expected_input_grad)
    assert layer.paca_delta.grad.dtype == layer.paca_delta.dtype
    assert relative(layer.paca_delta.grad, column_gradient_of(twin)) <= rounding
    assert layer.base.grad is None
    assert bias is False or layer.bias.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradcheck(kind: str, shape: tuple[int, ...]) -> None:
    layer, _ = pair_of(kind)

    def forward(input: Tensor, _: Tensor) -> Tensor:
        if layer.keeps_weight:  # the numerical derivative moves the delta, and the graph keeps the weight
            layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
            layer.write_columns()
        return layer(input)

    input = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (input, layer.paca_delta))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_in_place_activation_may_follow(kind: str, shape: tuple[int, ...]) -> None:
    layer, twin = pair_of(kind)
    input = torch.randn(shape, dtype=torch.float64)
    for module in (layer, twin):
        nn.Sequential(module, nn.ReLU(inplace=True))(input).square().sum().backward()
    assert relative(layer.paca_delta.grad, column_gradient_of(twin)) <= ROUNDING[torch.float64]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_may_be_used_twice_and_its_graph_too(kind: str) -> None:
    layer, twin = pair_of(kind)
    inputs = torch.randn(2, 5, IN, dtype=torch.float64)
    for module in (layer, twin):
        loss = loss_of(module(inputs[0])) + loss_of(module(inputs[1]).square())
        loss.backward(retain_graph=True)
        loss.backward()  # gradients accumulate
    assert relative(layer.paca_delta.grad, column_gradient_of(twin)) <= ROUNDING[torch.float64]


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_a_zero_gradient(kind: str) -> None:
    layer, _ = pair_of(kind)
    output = layer(torch.zeros(0, 3, IN, dtype=torch.float64))
    assert output.shape == (0, 3, OUT)
    output.sum().backward()
    assert torch.equal(layer.paca_delta.grad, torch.zeros_like(layer.paca_delta))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_nothing_is_tapped(kind: str) -> None:
    layer, twin = pair_of(kind)
    input = torch.randn(2, 5, IN, dtype=torch.float64)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(layer(input), twin(input))
    layer.requires_grad_(False)
    assert layer(input).grad_fn is None


@pytest.mark.parametrize("r", [1, IN])
def test_one_column_or_all_of_them(r: int) -> None:
    torch.manual_seed(0)
    layer = PaCALinear(IN, OUT, r=r, dtype=torch.float64)
    weight = layer.weight.detach().clone().requires_grad_()
    input = torch.randn(5, IN, dtype=torch.float64)
    for output in (layer(input), F.linear(input, weight, layer.bias)):
        loss_of(output).backward()
    assert relative(layer.paca_delta.grad, weight.grad[:, layer.paca_indices]) <= ROUNDING[torch.float64]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_takes_any_number_of_tokens(kind: str) -> None:
    torch.compiler.reset()
    layer, twin = pair_of(kind)
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 8, 5):
        input = torch.randn(2, tokens, IN, dtype=torch.float64)
        for output in (forward(input), twin(input)):
            loss_of(output).backward()
    assert relative(layer.paca_delta.grad, column_gradient_of(twin)) <= ROUNDING[torch.float64]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_the_default_compiler(kind: str) -> None:
    torch.compiler.reset()
    layer, _ = pair_of(kind, torch.bfloat16)
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        layer.paca_delta.grad = None
        input = torch.ones(2, 5, IN, dtype=torch.bfloat16, requires_grad=True)
        output = forward(input)
        loss_of(output).backward()
        results.append((output, input.grad, layer.paca_delta.grad))
    for found, expected in zip(*results, strict=True):
        assert relative(found, expected) <= ROUNDING[torch.bfloat16]
