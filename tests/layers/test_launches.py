"""How many kernels the tap launches on a GPU, counted without one."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paca_lightning import PaCAConfig, apply_paca
from paca_lightning.core.private.torch import fake_tensors
from paca_lightning.layers.autograd import TRACES_ADDMM, column_product


class Launches(TorchDispatchMode):
    """Records the operators that run a kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if not func.is_view and not name.startswith(("new_empty", "empty", "detach", "_unsafe_view", "prim::")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def forward_launches(layer: nn.Module, dtype: torch.dtype) -> list[str]:
    """Of a forward that a backward will follow. It takes the same way on every device."""
    input = torch.zeros(2, 5, 8, dtype=dtype, requires_grad=True)
    with Launches() as counted:
        layer(input)
    return counted.names


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_taps_forward_is_one_launch(dtype: torch.dtype, bias: bool) -> None:
    frozen = nn.Linear(8, 6, bias).to(dtype).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(frozen))
    apply_paca(model, PaCAConfig(r=4, alpha=6))
    ours, floor = forward_launches(model[0], dtype), forward_launches(frozen, dtype)
    assert len(floor) == 1  # the GEMM
    assert [name for name in ours if name not in ("mm", "addmm")] == ["index_select"]
    assert len(ours) == 2


@pytest.mark.parametrize("scaling", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_taps_backward_is_one_launch(dtype: torch.dtype, scaling: float) -> None:
    """Autograd itself does not run on a GPU that is not there; the tap's backward is this product."""
    with fake_tensors():
        grad_output, selected = (torch.empty(5, size, dtype=dtype, device="cuda") for size in (3, 2))
        with Launches() as counted:
            gradient = column_product(grad_output, selected, torch.float32, scaling)
    assert (gradient.dtype, gradient.shape) == (torch.float32, (3, 2))
    launches = ["addmm"] if TRACES_ADDMM or dtype == torch.float32 else ["mm", "mul"] if scaling != 1 else ["mm"]
    assert [name.split(".")[0] for name in counted.names] == launches


@pytest.mark.parametrize("scaling", [1.0, 1.5])
def test_the_product_is_scaled(scaling: float) -> None:
    grad_output, selected = torch.randn(5, 3), torch.randn(5, 2)
    expected = scaling * (grad_output.T @ selected)
    torch.testing.assert_close(column_product(grad_output, selected, torch.float32, scaling), expected)
