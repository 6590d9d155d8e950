"""LoRA exports compute in PEFT what the trained model computes, or are refused with another way out."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

from paca_lightning import PaCAConfig, PaCAError, attach, export_lora, export_merged, unload
from paca_lightning.conversion.convert import apply_paca
from tests.adapters.test_export import in_bf16, logits
from tests.plain_training import move_trained
from tests.tiny import tiny_llama

pytestmark = [
    pytest.mark.slow,  # for each of many cases
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT's: both copies are in the adapter
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]


def tiny_gpt2(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_layer=2, n_head=2, n_embd=64, vocab_size=384, n_positions=32, tie_word_embeddings=tied, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


BUILD: dict[str, Callable[[bool], nn.Module]] = {
    "Linear": lambda tied: tiny_llama(tie_word_embeddings=tied),
    "Conv1D": tiny_gpt2,
}
SAVED: dict[str, dict[str, list[str]]] = {
    "nothing": {"Linear": [], "Conv1D": []},
    "head": {"Linear": ["lm_head"], "Conv1D": ["lm_head"]},
    "embeddings": {"Linear": ["embed_tokens"], "Conv1D": ["wte"]},
    "norm": {"Linear": ["norm"], "Conv1D": ["ln_f"]},  # with norms in the blocks that are called alike
    "norms of blocks": {"Linear": ["input_layernorm"], "Conv1D": ["ln_1"]},
    "both ends": {"Linear": ["lm_head", "embed_tokens"], "Conv1D": ["lm_head", "wte"]},
}


def moved(model: nn.Module) -> nn.Module:
    """The converted model with all that is trained moved."""
    move_trained(model, seed=0, scale=0.05)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("kind", BUILD)
def test_a_dense_run(kind: str, saved: str, tied: bool, tmp_path: Path) -> None:
    """In bf16, PEFT rounds the sum of two products where PaCA rounds the columns: a few parts of a thousand."""
    for dtype, share in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        base = BUILD[kind](tied) if dtype == torch.float32 else in_bf16(BUILD[kind](tied))
        model = copy.deepcopy(base)
        apply_paca(model, PaCAConfig(r=4, modules_to_save=SAVED[saved][kind]))
        expected = logits(moved(model))
        effect = (logits(base) - expected).abs().max()
        export_lora(model, tmp_path / str(dtype))
        found = logits(PeftModel.from_pretrained(base, tmp_path / str(dtype)))
        assert (found - expected).abs().max() < share * effect


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("kind", BUILD)
def test_an_nf4_run(kind: str, saved: str, tied: bool, tmp_path: Path) -> None:
    """Exact on the base of the training; on the full-precision base it differs, as the warning says."""
    model, full = BUILD[kind](tied), BUILD[kind](tied)
    apply_paca(model, PaCAConfig(r=4, quantize="nf4", modules_to_save=SAVED[saved][kind]))
    expected = logits(moved(model))
    with pytest.warns(UserWarning, match="were trained on an NF4 base") as told:
        export_lora(model, tmp_path / "lora")
    share = re.search(r"differ from those in training by ([\d.]+)%", str(told[0].message))
    assert share is not None
    assert 5 < float(share[1]) < 12

    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(unload(model), tmp_path / "lora")), expected, rtol=1e-4, atol=1e-4
    )
    difference = (logits(PeftModel.from_pretrained(full, tmp_path / "lora")) - expected).abs().max()
    assert 1e-3 < difference < 0.5 * expected.abs().max()


def test_columns_that_began_quantized_are_told(tmp_path: Path) -> None:
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    model = nn.Sequential(layer)
    apply_paca(model, PaCAConfig(r=4, target_modules=["0"]))
    with pytest.warns(UserWarning, match=r"there all columns differ .* about 9% .*: the trained ones began quantized"):
        export_lora(model, tmp_path / "lora")


# ---- what a LoRA adapter cannot say


def thaw_norm(model: Any) -> nn.Parameter:
    return model.model.norm.weight


def thaw_bias(model: Any) -> nn.Parameter:
    return model.model.layers[0].self_attn.q_proj.bias


@pytest.mark.parametrize("thawed", [thaw_norm, thaw_bias])
def test_thawed_parameters_are_refused_and_merged(thawed: Callable[[Any], nn.Parameter], tmp_path: Path) -> None:
    model = in_bf16(tiny_llama(attention_bias=True))
    apply_paca(model, PaCAConfig(r=4))
    parameter = thawed(model).requires_grad_(True)
    attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model)
    expected = logits(moved(model))
    with pytest.raises(PaCAError, match=r"A LoRA adapter cannot hold 'model\..*\(1 such tensors\).*Use export_merged"):
        export_lora(model, tmp_path / "lora")
    export_merged(model, tmp_path / "merged")
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert parameter.requires_grad


def test_a_name_that_peft_finds_in_others_is_refused(tmp_path: Path) -> None:
    """``norm`` of a bare Llama: PEFT matches ``layers.0.input_layernorm``, too."""
    bare = tiny_llama().model
    apply_paca(bare, PaCAConfig(r=4, modules_to_save=["norm"]))
    with pytest.raises(PaCAError, match=r"path ends with 'norm' .*'layers\.0\.input_layernorm'.*Use export_merged"):
        export_lora(bare, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_list_of_blocks_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.extra = nn.ModuleList([nn.Linear(4, 4)])
    apply_paca(model, PaCAConfig(r=4, modules_to_save=["extra"]))
    with pytest.raises(PaCAError, match=r"PEFT refuses 'model\.extra', a ModuleList, in modules_to_save"):
        export_lora(model, tmp_path / "lora")


BESIDE = {
    "whole": PaCAConfig(r=4, modules_to_save=["head"]),
    "columns": PaCAConfig(r=4, target_modules=["head", "v_proj"]),
}


@pytest.mark.parametrize("config", BESIDE.values(), ids=BESIDE)
def test_what_is_trained_beside_the_model_is_refused(config: PaCAConfig, tmp_path: Path) -> None:
    model = nn.ModuleDict({"net": tiny_llama(), "head": nn.Linear(64, 8)})
    apply_paca(model, config)
    with pytest.raises(PaCAError, match=r"of LlamaForCausalLM cannot hold 'head' \(1 such .* path='net' for the"):
        export_lora(model, tmp_path / "lora")
    export_lora(model, tmp_path / "lora", path="net")


def test_running_statistics_of_a_module_trained_whole_are_exported(tmp_path: Path) -> None:
    def with_norm() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8)))

    model = with_norm()
    apply_paca(model, PaCAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)) + 3
    moved(model).train()(x)
    export_lora(model, tmp_path / "lora")
    found = PeftModel.from_pretrained(with_norm(), tmp_path / "lora").eval()
    torch.testing.assert_close(found.base_model.model(x), model.eval()(x))
