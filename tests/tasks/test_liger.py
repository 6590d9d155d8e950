"""Liger's kernels in a model: what a machine without a GPU can see of them."""

import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from paca_lightning import PaCAConfig, PaCAError, PaCALinear, apply_paca
from paca_lightning.tasks.liger import replace_modules, use_liger
from tests.tiny import tiny_llama


@pytest.fixture
def _liger() -> None:
    for name in ("triton", "liger_kernel"):
        pytest.importorskip(name, reason="Liger's kernels need Triton, which comes with PyTorch's CUDA builds")


@pytest.mark.usefixtures("_liger")
@pytest.mark.parametrize("converted_first", [False, True])
def test_norms_and_activations_become_ligers_and_pacas_layers_stay(converted_first: bool) -> None:
    model = tiny_llama()
    for change in (lambda: apply_paca(model, PaCAConfig(r=4)), lambda: replace_modules(model))[
        :: 1 if converted_first else -1
    ]:
        change()
    block = model.model.layers[0]
    assert repr(block.input_layernorm).startswith("LigerRMSNorm")
    assert "LigerSwiGLUMLP" in repr(block.mlp.forward)
    assert isinstance(block.mlp.up_proj, PaCALinear)
    assert isinstance(block.self_attn.q_proj, PaCALinear)


@pytest.mark.usefixtures("_liger")
def test_a_model_without_kernels_is_refused() -> None:
    with pytest.raises(PaCAError, match="no kernels for GPT2LMHeadModel"):
        replace_modules(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)))


@pytest.mark.parametrize("missing", ["triton", "liger_kernel"])
def test_a_missing_package_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paca_lightning.tasks.liger.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(PaCAError, match=rf"needs {missing}.*paca-lightning\[liger\]"):
        use_liger(tiny_llama())


def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paca_lightning.tasks.liger.find_spec", lambda name: object())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(PaCAError, match="needs a GPU"):
        use_liger(tiny_llama())


def test_a_transformers_without_the_integration_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0 has none; the package itself must be imported all the same."""
    monkeypatch.setitem(sys.modules, "transformers.integrations.liger", None)
    with pytest.raises(PaCAError, match="needs a later transformers than"):
        replace_modules(tiny_llama())
