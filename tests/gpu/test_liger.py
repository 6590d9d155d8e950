"""Liger's kernels on the GPU: a converted model computes and learns as without them."""

import copy

import pytest
import torch

from paca_lightning import PaCAConfig, apply_paca
from paca_lightning.tasks.liger import use_liger
from tests.gpu.test_step import loss_of, tokens
from tests.tiny import tiny_llama


@pytest.mark.cuda_only
def test_a_model_with_liger_equals_one_without(device: str) -> None:
    pytest.importorskip("liger_kernel")
    model = tiny_llama().to(device)
    apply_paca(model, PaCAConfig(r=4))
    ids, liger = tokens(device), copy.deepcopy(model)
    expected = loss_of(model, ids)
    expected.backward()
    use_liger(liger)  # last, as it also replaces the rotary embedding of all Llamas
    loss = loss_of(liger, ids)
    loss.backward()
    # fp32; other kernels sum in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, plain in zip(liger.parameters(), model.parameters(), strict=True):
        if plain.requires_grad:
            torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-5)
