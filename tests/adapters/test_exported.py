"""Exports write the model that is meant, for the programs that will load it, or say why they cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    apply_paca,
    attach,
    export_lora,
    export_merged,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
)
from tests.adapters.test_export import trained
from tests.tiny import tiny_llama

IDS = torch.arange(3, 23).view(2, 10)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}


def bert(kind: type[nn.Module] = hf.BertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    return kind(hf.BertConfig(**SIZES))


def t5() -> Any:
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    )


def output(model: Any) -> Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, **extra)[0]
    return found


# ---- several Hugging Face models in one module


def teacher_and_student() -> nn.ModuleDict:
    pair = nn.ModuleDict({"teacher": tiny_llama(seed=1), "student": tiny_llama(seed=2)})
    trained(pair["student"], PaCAConfig(r=4))
    return pair


@pytest.mark.parametrize("export", [export_merged, export_lora])
def test_several_models_are_refused_without_a_path(export: Callable[..., None], tmp_path: Path) -> None:
    pair = teacher_and_student()
    with pytest.raises(PaCAError, match=r"holds 2 Hugging Face models, \['student', 'teacher'\].* path='student'"):
        export(pair, tmp_path / "out")
    with pytest.raises(PaCAError, match=r"path='pupil': ModuleDict has no such module\. Hugging Face models: \['stud"):
        export(pair, tmp_path / "out", path="pupil")
    with pytest.raises(PaCAError, match="no PaCA layers"):
        export(pair, tmp_path / "out", path="teacher")
    assert not (tmp_path / "out").exists()


def test_the_model_of_the_path_is_written(tmp_path: Path) -> None:
    pair = teacher_and_student()
    expected = output(pair["student"])
    export_merged(pair, tmp_path / "merged", path="student")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(output(plain), expected, rtol=0.05, atol=0.02)  # rounded to bf16
    teacher = output(pair["teacher"])
    assert (teacher - expected).abs().max() > 10 * (output(plain) - expected).abs().max()

    tiny_llama(seed=2).save_pretrained(tmp_path / "base")
    pair["student"].config._name_or_path = str(tmp_path / "base")
    export_lora(pair, tmp_path / "lora", path="student")
    with_lora = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(output(with_lora), expected, rtol=1e-4, atol=1e-4)


def other_order(teacher: Any, student: Any) -> nn.ModuleDict:
    return nn.ModuleDict({"student": student, "teacher": teacher})


def first_order(teacher: Any, student: Any) -> nn.ModuleDict:
    return nn.ModuleDict({"teacher": teacher, "student": student})


ORDERS = [first_order, other_order]


def named(path: Path) -> set[str]:
    """Layers that an adapter directory names, of either kind."""
    names = load_file(path / "adapter_model.safetensors")
    return {name.split(".paca_")[0].split(".lora_")[0] for name in names}


@pytest.mark.parametrize("order", ORDERS)
def test_names_count_from_the_model_that_is_trained(order: Callable[..., nn.ModuleDict], tmp_path: Path) -> None:
    pair = order(tiny_llama(seed=1).requires_grad_(False), tiny_llama(seed=2))
    pair["student"].config._name_or_path, pair["teacher"].config._name_or_path = "the-student", "the-teacher"
    trained(pair, PaCAConfig(r=4))
    expected = output(pair["student"])
    save_adapter(pair, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "the-student"
    )
    save_adapter(pair["student"], tmp_path / "part")
    export_lora(pair, tmp_path / "lora", path="student")
    assert named(tmp_path / "adapter") == named(tmp_path / "part") == named(tmp_path / "lora")

    bare = tiny_llama(seed=2)
    load_adapter(bare, tmp_path / "adapter")
    assert torch.equal(output(bare), expected)
    for other in ORDERS:
        again = other(tiny_llama(seed=1).requires_grad_(False), tiny_llama(seed=2))
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(output(again["student"]), expected)
        assert not any(paca_layers(again["teacher"]))
    for flag in (True, False):  # nobody freezes the teacher, or everything is frozen
        again = order(tiny_llama(seed=1), tiny_llama(seed=2)).requires_grad_(flag)
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(output(again["student"]), expected)
        assert not any(paca_layers(again["teacher"]))


@pytest.mark.parametrize("order", ORDERS)
def test_a_student_draws_the_same_columns_beside_its_teacher(order: Callable[..., nn.ModuleDict]) -> None:
    pair, bare = order(tiny_llama(seed=1).requires_grad_(False), tiny_llama(seed=2)), tiny_llama(seed=2)
    for model in (pair, bare):
        apply_paca(model, PaCAConfig(r=4))
    drawn = {path: layer.paca_indices for path, layer in paca_layers(pair["student"])}
    assert all(torch.equal(layer.paca_indices, drawn[path]) for path, layer in paca_layers(bare))


def test_two_models_that_are_both_trained_make_one_adapter(tmp_path: Path) -> None:
    pair = trained(nn.ModuleDict({"query": tiny_llama(seed=1), "passage": tiny_llama(seed=2)}), PaCAConfig(r=4))
    save_adapter(pair, tmp_path / "adapter")
    other = nn.ModuleDict({"query": tiny_llama(seed=1), "passage": tiny_llama(seed=2)})
    load_adapter(other, tmp_path / "adapter")
    for name in pair:
        assert torch.equal(output(other[name]), output(pair[name]))


# ---- models of other kinds

KINDS: dict[str, tuple[Callable[[], Any], Any, Any, str | None]] = {
    "BERT, classes": (
        bert, hf.AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification, "SEQ_CLS",
    ),
    "BERT, masked": (lambda: bert(hf.BertForMaskedLM), hf.AutoModelForMaskedLM, AutoPeftModel, None),
    "BERT": (lambda: bert(hf.BertModel), hf.AutoModel, AutoPeftModel, None),
    "T5": (t5, hf.AutoModelForSeq2SeqLM, AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "head"), [*((name, False) for name in KINDS), ("BERT, classes", True)])
def test_other_kinds_of_models_load_elsewhere(name: str, head: bool, tmp_path: Path) -> None:
    build, auto, auto_peft, task = KINDS[name]
    build().save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base")
    trained(model, PaCAConfig(r=4, modules_to_save=["classifier"] if head else []))
    if head:
        with torch.no_grad():
            model.classifier.weight.add_(0.1)
    expected = output(model)

    export_lora(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["task_type"] == task
    torch.testing.assert_close(output(auto_peft.from_pretrained(tmp_path / "lora")), expected, rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == task

    export_merged(model, tmp_path / "merged")
    in_bf16 = merge(model).to(torch.bfloat16)
    assert torch.equal(output(auto.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)), output(in_bf16))


# ---- what a LoRA adapter cannot be


def test_a_head_whose_columns_were_trained_is_refused(tmp_path: Path) -> None:
    model = trained(bert(), PaCAConfig(r=4, target_modules=["query", "classifier"]))
    with pytest.raises(PaCAError, match="PEFT loads 'classifier' of a model for SEQ_CLS as a whole"):
        export_lora(model, tmp_path / "lora")


def mamba() -> Any:
    return hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4))


def test_what_peft_refuses_is_refused_before(tmp_path: Path) -> None:
    model = trained(mamba(), PaCAConfig(r=2))
    with pytest.raises(
        PaCAError, match=r"PEFT refuses a LoRA adapter on '.*out_proj' of a Mamba model \(2 such layers"
    ):
        export_lora(model, tmp_path / "lora")
    model = trained(mamba(), PaCAConfig(r=2, exclude_modules=["out_proj"]))
    export_lora(model, tmp_path / "lora")


def test_what_changed_beside_the_columns_is_not_lost(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    model.model.norm.requires_grad_(True)

    attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model)
    with pytest.raises(PaCAError, match=r"cannot hold 'model\.norm\.weight' \(1 such tensors\)"):
        export_lora(model, tmp_path / "lora")
