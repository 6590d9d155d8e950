"""Exports compute what the trained model computes, in programs without PaCA."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    apply_paca,
    export_lora,
    export_merged,
    merge,
    paca_layers,
    unload,
    write_columns,
)
from paca_lightning.other_methods.peft_model import adapt
from paca_lightning.tasks.pretrained import build_causal_lm
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = torch.arange(24).view(2, 12) * 7


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model: nn.Module, config: PaCAConfig) -> nn.Module:
    """A converted model with trained columns."""
    apply_paca(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.copy_(0.02 * torch.randn(layer.paca_delta.shape, generator=generator))
    write_columns(model)
    return model


def in_bf16(model: nn.Module) -> nn.Module:
    """Cast parameters only, as from_pretrained does: Llama's rotary frequencies, a buffer, stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=384, n_positions=32))


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_merged_checkpoint_computes_the_same(tmp_path: Path, quantize: str | None, tied: bool) -> None:
    model = trained(in_bf16(tiny_llama(tie_word_embeddings=tied)), PaCAConfig(r=4, alpha=6, quantize=quantize))
    expected = logits(model)
    export_merged(model, tmp_path / "merged", tiny_tokenizer())
    assert torch.equal(logits(model), expected)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(plain), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == {
        name for name in tiny_llama(tie_word_embeddings=tied).state_dict() if not (tied and name == "lm_head.weight")
    }


@pytest.mark.parametrize("sizes", [("5GB", "100KB"), ("100KB", "5GB")])
def test_a_second_export_leaves_no_weights_of_the_first(
    tmp_path: Path, sizes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.md").write_text("mine")
    first, second = (trained(in_bf16(tiny_llama(seed)), PaCAConfig(r=4)) for seed in (0, 1))
    for model, size in zip((first, second), sizes, strict=True):
        monkeypatch.setattr("paca_lightning.adapters.export.SHARD_SIZE", size)
        export_merged(model, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(second))
    assert len(list(tmp_path.glob("model*"))) == (1 if sizes[1] == "5GB" else 4)
    assert (tmp_path / "notes.md").exists()


def test_a_directory_with_an_adapter_is_refused_for_a_merged_model(tmp_path: Path) -> None:
    model = trained(tiny_llama(), PaCAConfig(r=4))
    export_lora(model, tmp_path)
    with pytest.raises(PaCAError, match="holds an adapter"):
        export_merged(model, tmp_path)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merged_columns_are_exact(tmp_path: Path, quantize: str | None) -> None:
    dense = tiny_llama()
    model = trained(tiny_llama(), PaCAConfig(r=4, quantize=quantize))
    export_merged(model, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    for path, layer in paca_layers(model):
        columns = dense.get_submodule(path).weight[:, layer.paca_indices] + layer.paca_delta
        assert torch.equal(state[f"{path}.weight"][:, layer.paca_indices], columns.bfloat16())


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_transposed_layers_are_merged(tmp_path: Path, quantize: str | None) -> None:
    model = trained(tiny_gpt2().bfloat16(), PaCAConfig(r=4, quantize=quantize))
    export_merged(nn.ModuleDict({"model": model}), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(model))


def test_layers_that_bitsandbytes_quantized_are_merged(tmp_path: Path) -> None:
    model = in_bf16(tiny_llama())
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        dense = model.get_submodule(path)
        layer = bnb.nn.Linear4bit(64, dense.out_features, bias=False, quant_type="nf4")
        layer.load_state_dict(dense.state_dict())
        model.set_submodule(path, layer.to("cpu"))
    trained(model, PaCAConfig(r=4, target_modules=["q_proj", "up_proj"]))
    export_merged(model, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0.02, atol=0.01)
    weight = model.model.layers[0].self_attn.q_proj.dequantize(torch.bfloat16)
    assert torch.equal(plain.model.layers[0].self_attn.q_proj.weight, weight)


def test_a_model_without_paca_layers_is_refused(tmp_path: Path) -> None:
    for export in (export_merged, export_lora):
        with pytest.raises(PaCAError, match="no PaCA layers"):
            export(tiny_llama(), tmp_path / "out")
    plain = trained(nn.Sequential(nn.Linear(64, 8)), PaCAConfig(r=4))
    with pytest.raises(PaCAError, match="no Hugging Face model in Sequential"):
        export_merged(plain, tmp_path / "out")
    assert not list(tmp_path.iterdir())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"alpha": 10.0},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
    "ranks, one alpha": {"alpha": 10.0, "rank_pattern": {"q_proj": 2}},
    "alphas": {"alpha_pattern": {"q_proj": 2.0}, "rank_pattern": {"down_proj": 3}},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_lora_adapter_computes_the_same_in_peft(tmp_path: Path, name: str) -> None:
    model = trained(tiny_llama(), PaCAConfig(r=4, **SETTINGS[name]))
    if name == "head":
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    with_lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(with_lora), expected, rtol=1e-4, atol=1e-4)
    assert (logits(tiny_llama()) - expected).abs().max() > 0.01

    reloaded = with_lora.merge_and_unload()
    merge(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            torch.testing.assert_close(reloaded.get_submodule(path).weight, module.weight, rtol=0, atol=1e-6)


def test_lora_adapter_of_transposed_layers(tmp_path: Path) -> None:
    model = trained(tiny_gpt2(), PaCAConfig(r=4))
    export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora")), logits(model), rtol=1e-4, atol=1e-4
    )


def test_lora_adapter_of_an_nf4_model_fits_its_unloaded_base(tmp_path: Path) -> None:
    model = trained(tiny_llama(), PaCAConfig(r=4, quantize="nf4"))
    expected = logits(model)
    with pytest.warns(UserWarning, match="14 layers were trained on an NF4 base"):
        export_lora(nn.ModuleDict({"model": model}), tmp_path / "lora")
    with_lora = PeftModel.from_pretrained(unload(model), tmp_path / "lora")
    torch.testing.assert_close(logits(with_lora), expected, rtol=1e-4, atol=1e-4)


def test_lora_settings(tmp_path: Path) -> None:
    export_lora(trained(tiny_llama(), PaCAConfig(r=4, alpha=8, target_modules=["q_proj"])), tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["target_modules"] == ["q_proj"]


def test_lora_settings_name_paths_where_a_last_segment_would_name_other_layers(tmp_path: Path) -> None:
    config = PaCAConfig(r=4, target_modules=["q_proj", "up_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    model = trained(tiny_llama(), config)
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["target_modules"] == [name for name, _ in paca_layers(model)]
    with_lora = PeftModel.from_pretrained(unload(model), tmp_path / "lora")
    torch.testing.assert_close(logits(with_lora), expected, rtol=1e-4, atol=1e-4)


def test_lora_adapter_as_petals_reads_it(tmp_path: Path) -> None:
    """Petals 2.2 fills each block by itself: what it reads of the settings, and how it finds the tensors of a layer."""
    model = trained(tiny_llama(), PaCAConfig(r=4, alpha=8))
    expected = logits(model)
    export_lora(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert settings["peft_type"] == "LORA"
    assert settings["lora_dropout"] == 0
    assert settings["init_lora_weights"] is True
    found = 0
    for index, block in enumerate(unload(model).model.layers):
        for name, layer in block.named_modules():
            child = name.rpartition(".")[2]
            if not isinstance(layer, torch.nn.Linear) or child not in settings["target_modules"]:
                continue
            keys = [key for key in tensors if f".layers.{index}." in key and child in key]
            lora_a, lora_b = (
                next(tensors[key] for key in keys if key.endswith(f".lora_{part}.weight")) for part in "AB"
            )
            assert len(lora_a) == settings["r"]
            with torch.no_grad():
                layer.weight += lora_b @ lora_a * (settings["lora_alpha"] / settings["r"])
            found += 1
    assert found == 14
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "LoRA"])
def test_a_flipped_bit_in_an_export_is_refused_when_we_read_it(tmp_path: Path, merged: bool) -> None:
    model = trained(tiny_llama(), PaCAConfig(r=4))
    (export_merged if merged else export_lora)(model, tmp_path)

    def read() -> None:
        if merged:
            build_causal_lm(str(tmp_path))
        else:
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            adapt(tiny_llama(), LoraConfig(r=4, lora_alpha=4, target_modules=targets)).load(str(tmp_path))

    read()
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 2]) + whole[-8:])
    with pytest.raises(PaCAError, match=rf"{file.name}' is not what was saved .* remove checksums\.json"):
        read()
    (tmp_path / "checksums.json").unlink()
    read()
