"""What servers read of exports, by the rules of their own readers; `make serving` runs llama.cpp itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from paca_lightning import PaCAConfig, export_lora, export_merged, merge
from tests.adapters.test_export import SETTINGS, trained
from tests.tiny import tiny_llama

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma2": MODEL_ARCH.GEMMA2,
    "phi3": MODEL_ARCH.PHI3,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_knows_each_tensor_of_a_merged_model(family: str, tmp_path: Path) -> None:
    model = trained(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES)), PaCAConfig(r=4))
    export_merged(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    names = get_tensor_name_map(FAMILIES[family], SIZES["num_hidden_layers"])
    tensors = load_file(tmp_path / "model.safetensors")
    assert [name for name in tensors if names.get_name(name, (".weight", ".bias")) is None] == []
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in tensors) == (not model.config.tie_word_embeddings)  # tied ones are written once


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "head"])
def test_a_lora_adapter_means_the_same_to_servers_that_read_one_rank(name: str, tmp_path: Path) -> None:
    """vLLM scales by lora_alpha / r of the config, llama.cpp by lora_alpha / the tensor's own rank."""
    model, base = trained(tiny_llama(), PaCAConfig(r=4, **SETTINGS[name])), tiny_llama()
    export_lora(model, tmp_path)
    config: dict[str, Any] = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merge(model)
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    assert not config.keys() & {"rank_pattern", "alpha_pattern"}
    assert config["modules_to_save"] is None  # which vLLM refuses
    for key, selection in tensors.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = tensors[key.replace("lora_A", "lora_B")] @ selection
            assert path.rpartition(".")[2] in config["target_modules"]
            for scaling in (config["lora_alpha"] / config["r"], config["lora_alpha"] / selection.shape[0]):
                trained_weight = base.get_submodule(path).weight + scaling * update
                torch.testing.assert_close(trained_weight, model.get_submodule(path).weight, rtol=0, atol=1e-6)
