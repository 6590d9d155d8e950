"""Layers with an NF4 base: the same results as a dense layer of the dequantized weight with the columns in."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from paca_lightning import PaCAError, QPaCALinear
from paca_lightning.layers import nf4
from paca_lightning.layers import nf4_autograd as dequantized
from tests.layers.reference import effective, nf4_layer


@pytest.mark.parametrize("shape", [(128,), (5, 128), (2, 5, 128)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_equals_a_dense_layer(shape: tuple[int, ...], bias: bool, alpha: float | None) -> None:
    layer, weight = nf4_layer(bias=bias, alpha=alpha)
    x, delta = torch.randn(shape, requires_grad=True), layer.paca_delta.detach().clone().requires_grad_()
    expected = F.linear(x, effective(layer, weight, delta), layer.bias)
    output = layer(x)
    torch.testing.assert_close(output, expected)
    seed = torch.randn_like(output)
    found = torch.autograd.grad(output, (x, layer.paca_delta), seed)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, delta), seed))


@pytest.mark.parametrize("columns", [100, 40])
def test_rows_that_are_no_whole_blocks(columns: int) -> None:
    layer, weight = nf4_layer(columns)
    x = torch.randn(3, columns, requires_grad=True)
    expected = effective(layer, weight, layer.paca_delta.detach())
    torch.testing.assert_close(layer(x), F.linear(x, expected, layer.bias))
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], expected.sum(0).expand(3, -1))


def test_gradcheck() -> None:
    layer, _ = nf4_layer(64, 6, r=3, alpha=2.0, dtype=torch.float64)
    assert layer.paca_delta.dtype == torch.float64
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: layer(x), (x, layer.paca_delta))


def test_trains_as_a_dense_layer_does() -> None:
    layer, weight = nf4_layer()
    delta = nn.Parameter(layer.paca_delta.detach().clone())
    optimizers = [torch.optim.AdamW([parameter], lr=1e-2) for parameter in (layer.paca_delta, delta)]
    for _ in range(8):
        x, target = torch.randn(16, 128), torch.randn(16, 24)
        losses = (
            F.mse_loss(layer(x), target),
            F.mse_loss(F.linear(x, effective(layer, weight, delta), layer.bias), target),
        )
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(layer.paca_delta, delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer, weight = nf4_layer(dtype=dtype)
    x = torch.randn(5, 128, dtype=dtype, requires_grad=True)
    expected = F.linear(x, effective(layer, weight, layer.paca_delta.detach(), dtype), layer.bias)
    assert torch.equal(layer(x), expected)
    grads = torch.autograd.grad(layer(x).sum(), (x, layer.paca_delta))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]


def test_autocast() -> None:
    layer, weight = nf4_layer()
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    expected = effective(layer, weight, layer.paca_delta.detach(), torch.bfloat16)
    assert torch.equal(output, F.linear(x.bfloat16(), expected, layer.bias.bfloat16()))
    output.sum().backward()
    assert (x.grad.dtype, layer.paca_delta.grad.dtype) == (torch.float32, torch.float32)


def test_a_bias_may_be_trained_too() -> None:
    layer, _ = nf4_layer()
    layer.bias.requires_grad_()
    layer(torch.randn(2, 5, 128)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 10.0))


def test_keeps_only_the_selected_inputs() -> None:
    layer, _ = nf4_layer()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(7, 128, requires_grad=True))
    assert kept == [(7, 4)]


@pytest.mark.parametrize(("needs_grad", "times"), [(True, 2), (False, 1)])
def test_dequantizes_again_only_for_the_gradient_of_its_input(
    needs_grad: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = nf4_layer()
    calls = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return nf4.dequantize_rows(*args, **options)

    monkeypatch.setattr(dequantized, "dequantize_rows", counted)
    layer(torch.randn(3, 128, requires_grad=needs_grad)).sum().backward()
    assert len(calls) == times


def test_compiles_without_graph_breaks() -> None:
    layer, _ = nf4_layer()
    x = torch.randn(2, 5, 128, requires_grad=True)
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        output = forward(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, layer.paca_delta))))
    torch.testing.assert_close(results[0], results[1])


def test_compiled_keeps_no_dequantized_weight() -> None:
    """The compiler would take the backward's dequantization for the forward's, and keep its result in between."""
    layer, _ = nf4_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        compiled(torch.randn(5, 128, requires_grad=True))
    assert kept
    assert (layer.out_features, layer.in_features) not in {tuple(shape) for shape in kept}


def test_checkpointing_changes_nothing() -> None:
    layer, _ = nf4_layer()
    x = torch.randn(2, 5, 128, requires_grad=True)
    results = []
    for forward in (layer, functools.partial(checkpoint, layer, use_reentrant=False)):
        output = forward(x)
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, layer.paca_delta))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_construction_needs_no_weights() -> None:
    layer = QPaCALinear(100, 24, device="meta", r=3, indices=torch.tensor([1, 5, 99]))
    assert layer.packed.shape == (24, 64)
    assert layer.absmax.shape == (24, 2)
    assert layer.paca_base_columns.shape == layer.paca_delta.shape == (24, 3)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer.to_empty(device="cpu").paca_indices.tolist() == [1, 5, 99]


def test_constructed_like_a_linear_layer() -> None:
    layer = QPaCALinear(64, 8, bias=False, dtype=torch.bfloat16, r=2, alpha=4)
    assert layer.bias is None
    assert layer.scaling == 2
    assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).shape == (3, 8)
    assert repr(layer) == "QPaCALinear(in_features=64, out_features=8, bias=False, r=2, scaling=2)"
    with pytest.raises(PaCAError, match="r=65 must lie between 1 and in_features=64"):
        QPaCALinear(64, 8, r=65)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_casting_a_model_leaves_the_quantized_weight_alone(cast: Any) -> None:
    layer, _ = nf4_layer(dtype=torch.bfloat16)
    before = layer.dequantize(torch.float32)
    cast(layer)
    assert (layer.packed.dtype, layer.absmax.dtype) == (torch.uint8, torch.bfloat16)
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert layer.paca_delta.dtype == torch.promote_types(torch.float32, layer.bias.dtype)
    bias = layer.bias
    layer.release(trained=True)
    assert layer.weight.dtype == bias.dtype


def test_copies_and_state_dicts_are_exact() -> None:
    layer, _ = nf4_layer()
    other = QPaCALinear(128, 24, r=4)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128)
    for twin in (copy.deepcopy(layer), other):
        assert torch.equal(twin(x), layer(x))
        assert twin.paca_delta is not layer.paca_delta


def test_another_delta_loads_but_other_columns_do_not() -> None:
    layer, weight = nf4_layer()
    state = {"paca_delta": torch.ones(24, 4), "paca_indices": layer.paca_indices.clone()}
    layer.load_state_dict(state, strict=False)
    expected = effective(layer, weight, torch.ones(24, 4))
    torch.testing.assert_close(layer.dequantize(), expected)
    state["paca_indices"] = torch.arange(4)
    with pytest.raises(PaCAError, match="unquantized weight, which is gone"):
        nn.Sequential(layer).load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=False)
    with pytest.raises(PaCAError, match="unquantized weight, which is gone"):
        layer.move_to_columns(torch.arange(4))
