"""16-bit training: the delta's gradient does not overflow in fp16, and both of Lightning's fp16 precisions train."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca_lightning import PaCAConfig, apply_paca, attach, paca_layers
from paca_lightning.core.private.torch import fake_tensors
from paca_lightning.layers.autograd import column_product
from tests.layers.reference import batch
from tests.tiny import tiny_llama

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_beyond_fp16_is_finite(quantize: str | None, transposed: bool) -> None:
    model = nn.Sequential(Conv1D(3, 64) if transposed else nn.Linear(64, 3)).half()
    apply_paca(model, PaCAConfig(r=4, quantize=quantize))
    model(torch.full((2, 64), 256.0, dtype=torch.float16)).backward(torch.full((2, 3), 256.0, dtype=torch.float16))
    assert torch.equal(model[0].paca_delta.grad, torch.full((3, 4), 131072.0))  # the largest fp16 is 65504


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_product_has_the_deltas_dtype_on_every_device(device: str, dtype: torch.dtype) -> None:
    with fake_tensors():  # there need not be a GPU
        grad_output, selected = (torch.empty(5, size, dtype=dtype, device=device) for size in (3, 2))
        result = column_product(grad_output, selected, torch.float32)
    assert (result.dtype, result.device.type, result.shape) == (torch.float32, device, (3, 2))


def trained(
    model: nn.Module, *, scaler: torch.amp.GradScaler | None = None, autocast: bool = False, steps: int = 6
) -> list[float]:
    """Losses of some steps, as Lightning's precision plugins run them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    attach(optimizer, model)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = model(**batch()).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def converted(quantize: str | None) -> nn.Module:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4, quantize=quantize))
    return model


@pytest.fixture(scope="module", params=[None, "nf4"])
def quantize(request: pytest.FixtureRequest) -> str | None:
    return request.param


@pytest.fixture(scope="module")
def exact(quantize: str | None) -> list[float]:
    """Losses in fp32."""
    return trained(converted(quantize))


def test_16_mixed_trains_as_fp32_does(quantize: str | None, exact: list[float]) -> None:
    """Lightning runs 16-mixed on a GPU only; this is what it does there. A GradScaler unscales the fp32 deltas."""
    model, scaler = converted(quantize), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = trained(model, scaler=scaler, autocast=True)
    assert losses == pytest.approx(exact, rel=2e-3)
    assert losses[-1] < losses[0] - 0.5
    assert scaler.get_scale() == 2.0**10  # no step was skipped


def test_16_true_trains_as_fp32_does(quantize: str | None, exact: list[float]) -> None:
    """``16-true`` casts the model and scales no loss."""
    model = converted(quantize).half()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = trained(model)
    assert losses == pytest.approx(exact, rel=2e-3)
    assert losses[-1] < losses[0] - 0.5


def test_a_step_that_overflows_is_skipped_and_the_weights_stay() -> None:
    model = converted(None)
    weights: list[Tensor] = [layer.weight.clone() for _, layer in paca_layers(model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # the gradients of activations overflow
    trained(model, scaler=scaler, autocast=True, steps=1)
    assert scaler.get_scale() == 2.0**39
    assert all(
        torch.equal(layer.weight, weight) for (_, layer), weight in zip(paca_layers(model), weights, strict=True)
    )


def test_bf16_gradients_are_no_worse_than_a_rounding() -> None:
    grad_output, selected = (torch.randn(512, size).bfloat16() for size in (16, 4))
    exact = grad_output.double().t() @ selected.double()
    error = (column_product(grad_output, selected, torch.float32) - exact).abs().max()
    assert error <= 2.0**-8 * exact.abs().max()
