"""Models from directories and the hub, and what is wrong with them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version
from safetensors.torch import load_file, save_file

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.transformers import attention_of
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.pretrained import build_causal_lm
from tests.tiny import tiny_model_directory


def test_random_weights_need_no_weight_file(tmp_path):
    directory = tiny_model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    module = CausalLMModule(str(directory), pretrained=False)
    module.configure_model()
    assert sum(p.numel() for p in module.parameters()) > 100_000

    with torch.device("meta"):
        shape = CausalLMModule(str(directory))
        shape.configure_model()
    assert {p.device.type for p in shape.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_a_dtype_has_two_names(directory: Path, name: str) -> None:
    module = CausalLMModule(str(directory), dtype=name)
    module.configure_model()
    assert module.model is not None
    assert module.model.dtype == torch.bfloat16


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
GPTJ = "sdpa" if Version(hf.__version__) >= Version("5.24") else "eager"
ATTENTION = {
    "llama": (hf.LlamaConfig(**LLAMA), "sdpa"),
    "gpt_oss": (hf.GptOssConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0), "eager"),
    "gemma2": (hf.Gemma2Config(**LLAMA), "eager"),
    "mamba": (hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4), "eager"),
    "bloom": (hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4), "eager"),
    "mpt": (hf.MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, max_seq_len=16), "eager"),
    "gptj": (hf.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, **TOKENS), GPTJ),
}


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_what_the_model_has(name: str, pretrained: bool, tmp_path: Path) -> None:
    config, expected = ATTENTION[name]
    built = hf.AutoModelForCausalLM.from_config(config) if pretrained else config
    built.save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), pretrained=pretrained)
    module.configure_model()
    assert module.model is not None
    assert attention_of(module.model.config) == expected
    ids = torch.arange(3, 11)[None]
    module({"input_ids": ids}).sum().backward()


def test_attention_that_a_model_lacks_is_refused_with_the_way(tmp_path: Path) -> None:
    ATTENTION["bloom"][0].save_pretrained(tmp_path)
    with pytest.raises(PaCAError, match=r"Bloom.* does not support(?s:.*)\nLeave attn_implementation out to take what"):
        CausalLMModule(str(tmp_path), attn_implementation="sdpa", pretrained=False).configure_model()


def test_a_directory_without_a_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(PaCAError, match=r"no config.json.*notes\.txt"):
        CausalLMModule(str(tmp_path)).configure_model()


def test_a_directory_without_weights_is_named(tmp_path):
    directory = tiny_model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(PaCAError, match="could not be loaded"):
        CausalLMModule(str(directory)).configure_model()


def test_a_hub_id_while_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match="Without network, give a local directory"):
        CausalLMModule("nobody/no-such-model").configure_model()


def test_weights_that_are_missing_or_cut_off_are_named(directory, tmp_path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "up_proj" not in name}, file, {"format": "pt"})
    with pytest.raises(PaCAError, match=r"lack 2 tensors .*'model\.layers\.0\.mlp\.up_proj\.weight'"):
        CausalLMModule(str(tmp_path)).configure_model()
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(PaCAError, match="could not be loaded"):
        CausalLMModule(str(tmp_path)).configure_model()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp32", None)])
def test_dtypes_have_short_names_too(name: str, dtype: torch.dtype | None) -> None:
    built = build_causal_lm("configs/tiny-llama", pretrained=False, dtype=name)
    assert built.dtype == (dtype or torch.float32)
