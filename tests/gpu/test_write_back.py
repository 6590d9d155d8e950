"""The fused write-back on the GPU, bitwise against plain operators."""

import copy
import warnings

import pytest
import torch

from paca_lightning import PaCAConfig, apply_paca, paca_layers
from paca_lightning.layers import fused_write
from tests.gpu.test_step import optimizer_of, step, tokens
from tests.tiny import tiny_llama


@pytest.mark.cuda_only
@pytest.mark.parametrize("alpha", [4, 6], ids=["scaling 1", "scaling 1.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_writes_equal_plain_ones(
    device: str, dtype: torch.dtype, alpha: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(device, dtype)
    apply_paca(model, PaCAConfig(r=4, alpha=alpha))
    fused, ids = copy.deepcopy(model), tokens(device)
    optimizers = [optimizer_of(each, device) for each in (fused, model)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the kernel must not be given up
        for _ in range(3):
            step(fused, optimizers[0], ids)
    monkeypatch.setattr(fused_write, "can_fuse", lambda device: False)
    for _ in range(3):
        step(model, optimizers[1], ids)
    for (_, ours), (_, plain) in zip(paca_layers(fused), paca_layers(model), strict=True):
        assert torch.equal(ours.weight, plain.weight)
