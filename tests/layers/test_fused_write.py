"""The fused write-back: its kernel in Triton's interpreter, and when it is used."""

import copy
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paca_lightning import PaCAConfig, apply_paca, attach, paca_layers
from paca_lightning.conversion.select import change_steps
from paca_lightning.layers import fused_write
from paca_lightning.layers.fused_write import ColumnWrite, FusedWrite
from tests.moe import tiny_moe
from tests.tiny import tiny_llama

KERNEL = "paca_lightning.layers.column_kernel"
SAME_ROUNDING = torch.__version__ >= "2.13"
"""Earlier, PyTorch rounded a product before the sum on the CPU otherwise than Triton, unless it is exact."""


@pytest.fixture
def _fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device on which the kernel runs."""
    monkeypatch.setattr(fused_write, "can_fuse", lambda device: True)


@pytest.fixture
def _interpreter(_fusing: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton runs kernels on the CPU, if it is told so before it sees them."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    yield
    sys.modules.pop(KERNEL, None)


def column_write(
    rows: int,
    columns: int,
    r: int,
    dtype: torch.dtype,
    scaling: float,
    *,
    transposed: bool = False,
    steps: bool = False,
) -> Any:
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(columns, rows).to(dtype).t() if transposed else torch.randn(rows, columns).to(dtype)
    indices = torch.randperm(columns)[:r].sort().values
    base = weight.index_select(1, indices).contiguous()
    return ColumnWrite(weight, base, torch.randn(rows, r, dtype=wide), indices, scaling)


@pytest.mark.usefixtures("_interpreter")
@pytest.mark.parametrize("scaling", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_writes_what_plain_operators_write(dtype: torch.dtype, scaling: float) -> None:
    torch.manual_seed(0)
    writes = [
        column_write(100, 40, 6, dtype, scaling),
        column_write(33, 64, 5, dtype, scaling, transposed=True),
        column_write(64, 9, 8, dtype, scaling),
        dataclasses.replace(column_write(20, 9, 8, dtype, 1.0), factor=2.0 ** torch.arange(-2, 6).to(dtype)),
    ]
    expected = [write.weight.clone().index_copy_(1, write.indices, write.expected()) for write in writes]
    versions = [write.weight._version for write in writes]
    fused = FusedWrite(writes)
    fused.launch()
    assert fused.agrees()
    for write, weight, version in zip(writes, expected, versions, strict=True):
        # Triton's interpreter truncates to bf16, where a GPU rounds to nearest: up to one step of bf16.
        steps = 1 if dtype is torch.bfloat16 else 0
        if scaling != 0.3 or SAME_ROUNDING or dtype in (torch.float16, torch.bfloat16):
            torch.testing.assert_close(write.weight, weight, rtol=steps * 2**-7, atol=0)
        assert write.weight._version == version + 1  # a backward that saved the older weight notices


@pytest.mark.usefixtures("_interpreter")
def test_a_wrong_write_is_noticed() -> None:
    write = column_write(8, 9, 4, torch.float32, 1.0)
    fused = FusedWrite([write])
    fused.launch()
    write.weight[3, write.indices[2]] += 1e-3
    assert not fused.agrees()


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(optimizer, model)
    ids = torch.arange(64).view(2, 32)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.usefixtures("_interpreter")
def test_a_model_trains_bitwise_as_with_plain_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4, alpha=6 if SAME_ROUNDING else 8))
    other = train(copy.deepcopy(model))
    monkeypatch.setattr(fused_write, "can_fuse", lambda device: False)
    train(model)
    for (_, plain), (_, fused) in zip(paca_layers(model), paca_layers(other), strict=True):
        assert torch.equal(plain.weight, fused.weight)


class Operators(TorchDispatchMode):
    """Counts the operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.inplace_view not in func.tags and not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_fusing")
def test_a_write_back_of_32_layers_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(FusedWrite, "launch", lambda self: launched.append(self))
    monkeypatch.setattr(FusedWrite, "agrees", lambda self: True)
    model = tiny_llama(num_hidden_layers=32).bfloat16()
    apply_paca(model, PaCAConfig(r=4))
    writer = fused_write.ColumnWriter([layer for _, layer in paca_layers(model)])
    writer.write()
    del launched[:]
    with Operators() as operators:
        writer.write()
    assert len(launched) == 1
    assert operators.names == []


@pytest.mark.usefixtures("_fusing")
def test_new_steps_of_columns_are_written_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class InPlainOperators:
        def __init__(self, writes: list[ColumnWrite]) -> None:
            self.writes = writes

        def launch(self) -> None:
            for write in self.writes:
                write.weight.index_copy_(1, write.indices, write.expected())

        def agrees(self) -> bool:
            return True

    monkeypatch.setattr(fused_write, "FusedWrite", InPlainOperators)
    model = nn.Sequential(nn.Linear(6, 5))
    apply_paca(model, PaCAConfig(r=4, column_steps="input_rms"), calibration=[torch.randn(8, 6)])
    ((_, layer),) = paca_layers(model)
    writer = fused_write.ColumnWriter([layer])
    writer.write()
    change_steps(layer, torch.tensor([0.5, 1.0, 2.0, 4.0]))
    layer.paca_delta.data.fill_(1.0)
    writer.write()
    assert torch.equal(layer.weight[:, layer.paca_indices], layer.paca_base_columns + layer.factor * layer.paca_delta)


@pytest.mark.usefixtures("_fusing")
@pytest.mark.parametrize("failure", ["raises", "writes nothing"])
def test_a_kernel_that_fails_is_told_once_and_replaced(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(self: FusedWrite) -> None:
        if failure == "raises":
            raise RuntimeError("no compiler")

    monkeypatch.setattr(FusedWrite, "launch", launch)
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    with pytest.warns(UserWarning, match="one by one") as caught:
        train(model)
    assert len(caught) == 1
    for _, layer in paca_layers(model):
        expected = torch.add(layer.paca_base_columns, layer.paca_delta, alpha=layer.scaling)
        assert torch.equal(layer.weight[:, layer.paca_indices], expected)


@pytest.mark.usefixtures("_fusing")
def test_stacked_experts_are_written_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[FusedWrite] = []
    monkeypatch.setattr(FusedWrite, "launch", launched.append)
    model = tiny_moe("mixtral")
    apply_paca(model, PaCAConfig(r=4, target_modules=["experts.gate_up_proj", "experts.down_proj"]))
    for _, layer in paca_layers(model):
        torch.nn.init.ones_(layer.paca_delta)
    fused_write.ColumnWriter([layer for _, layer in paca_layers(model)]).write()
    assert launched == []
    for _, layer in paca_layers(model):
        columns = layer.rows()[..., layer.paca_indices]
        assert torch.equal(columns, layer.paca_base_columns + layer.scaling * layer.paca_delta)
