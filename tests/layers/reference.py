"""Plain references for the tests of layers: dense twins, NF4 in plain torch, tiny inputs."""

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paca_lightning import PaCAConfig, PaCALinear, QPaCALinear, apply_paca, merge, paca_layers
from paca_lightning.layers import nf4
from paca_lightning.layers.base import PaCALayer

IN, OUT, R = 24, 16, 4
ALPHA = 6.0  # scaling 1.5
INDICES = torch.tensor([2, 3, 11, 23])
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest difference over largest value."""
KINDS = ("dense", "transposed", "nf4")

NF4 = PaCAConfig(r=4, quantize="nf4")

# QLoRA (arXiv 2305.14314), appendix E.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


def reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed weight, exact scales and dequantized weight, for rows of whole blocks."""
    blocks = weight.float().view(len(weight), -1, 64)
    absmax = blocks.abs().amax(-1)
    codes = ((blocks / absmax[..., None])[..., None] - LEVELS).abs().argmin(-1)
    restored = LEVELS[codes] * absmax.bfloat16().float()[..., None]
    codes = codes.view(len(weight), -1)
    return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), absmax, restored.view_as(weight)


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nf4_layer(
    inputs: int = 128,
    outputs: int = 24,
    *,
    r: int = 4,
    alpha: float | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[QPaCALinear, Tensor]:
    """A layer with a random delta, and the unquantized weight it was made from."""
    torch.manual_seed(0)
    layer = PaCALinear(inputs, outputs, bias, dtype=dtype, r=r, alpha=alpha)
    weight = layer.weight.detach().clone()
    QPaCALinear.quantize(layer)
    with torch.no_grad():
        layer.paca_delta.normal_(std=0.1)
    return layer, weight


def nf4_values(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    packed, absmax = nf4.quantize_rows(weight)
    return nf4.dequantize_rows(packed, (absmax,), weight.shape[1], dtype)


def effective(layer: QPaCALinear, weight: Tensor, delta: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a layer stands for, put together by hand."""
    columns = weight[:, layer.paca_indices].to(delta.dtype) + layer.scaling * delta
    return nf4_values(weight, dtype).index_copy(1, layer.paca_indices, columns.to(dtype))


def batch(length: int = 12, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch()["input_ids"]).logits


def train(model: nn.Module, steps: int = 3) -> Tensor:
    """A few steps; returns the logits after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return logits(model)


def layer_and_twin(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[PaCALinear, nn.Linear]:
    """A PaCA layer with a trained delta, and a plain dense layer with the same weight."""
    torch.manual_seed(0)
    layer = PaCALinear(IN, OUT, bias, dtype=dtype, r=R, alpha=ALPHA, indices=INDICES)
    with torch.no_grad():
        layer.paca_delta.normal_(std=0.1)
    layer.write_columns()
    twin = nn.Linear(IN, OUT, bias, dtype=dtype)
    twin.load_state_dict({name: value.clone() for name, value in layer.state_dict().items() if "paca" not in name})
    return layer, twin


def pair_of(kind: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[PaCALayer, nn.Module]:
    """A PaCA layer of one of the ``KINDS`` with a trained delta, and a plain layer with the same weight."""
    if kind == "dense":
        return layer_and_twin(dtype, bias)
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if kind == "transposed" else nn.Linear(IN, OUT, bias)
    model = nn.Sequential(base.to(dtype))
    config = PaCAConfig(r=R, alpha=ALPHA, quantize="nf4" if kind == "nf4" else None)
    apply_paca(model, config, indices={"0": INDICES})
    ((_, layer),) = paca_layers(model)
    with torch.no_grad():
        layer.paca_delta.normal_(std=0.1)
    layer.write_columns()
    twin = merge(copy.deepcopy(model))[0].requires_grad_()
    return layer, twin


def loss_of(output: Tensor) -> Tensor:
    """A loss whose gradient differs from place to place."""
    return (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()


def column_gradient_of(twin: nn.Module) -> Tensor:
    """What the delta's gradient has to be, fp64."""
    gradient = twin.weight.grad if isinstance(twin, nn.Linear) else twin.weight.grad.t()
    return ALPHA / R * gradient[:, INDICES].double()


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())
