"""Adapters with new tokens: saved, loaded into the base model as it was, refused, exported."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    apply_paca,
    attach,
    export_lora,
    export_merged,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from paca_lightning.core.new_tokens import declared_new_tokens
from tests.new_tokens import IDS, NEW, TOKENS, VOCABULARY, with_new_tokens
from tests.tiny import tiny_llama

CONFIG = PaCAConfig(r=4)


def trained(train: Any = "rows", config: PaCAConfig = CONFIG, **settings: Any) -> nn.Module:
    model, _ = with_new_tokens(train=train, **settings)
    apply_paca(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("train", ["rows", "all"])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY + 1, 384])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_gives_the_untouched_base_its_tokens_and_unload_takes_them_back(
    tmp_path: Path, tied: bool, vocabulary: int, train: str
) -> None:
    settings = {"tie_word_embeddings": tied, "vocab_size": vocabulary}
    model = trained(train, **settings)
    save_adapter(model, tmp_path)
    base = tiny_llama(**settings)
    before, flags = state(base), {name: p.requires_grad for name, p in base.named_parameters()}
    load_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(model))
    merged = merge(copy.deepcopy(base))
    assert torch.equal(logits(merged), logits(model))
    assert merged.config.vocab_size == max(vocabulary, NEW[-1] + 1)
    unload(base)
    assert same(state(base), before)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert base.config.vocab_size == vocabulary
    assert declared_new_tokens(base) is None
    load_adapter(base, tmp_path)  # once more
    assert torch.equal(logits(base), logits(model))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_bf16_and_nf4_bases_load_bitwise_alike(tmp_path: Path, quantize: str | None) -> None:
    model, _ = with_new_tokens()
    apply_paca(model.bfloat16(), PaCAConfig(r=4, quantize=quantize))
    with torch.no_grad():
        model.lm_head.paca_rows.mul_(1.001)
    save_adapter(model, tmp_path)
    loaded = tiny_llama(vocab_size=VOCABULARY).bfloat16()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.lm_head.paca_rows, model.lm_head.paca_rows)
    assert loaded.lm_head.paca_rows.dtype == torch.float32


def test_a_model_that_has_the_tokens_takes_adapters_with_and_without_them(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path / "with")
    plain = tiny_llama(vocab_size=VOCABULARY)
    apply_paca(plain, CONFIG)
    save_adapter(plain, tmp_path / "without")
    built, _ = with_new_tokens()
    start = logits(copy.deepcopy(built))
    load_adapter(built, tmp_path / "with")
    assert torch.equal(logits(built), logits(model))
    load_adapter(built, tmp_path / "without")
    assert torch.equal(logits(built), start)


def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    for base, message in (
        (tiny_llama(vocab_size=VOCABULARY + 8), "added to a model with 350 embeddings, and this one has 358"),
        (with_new_tokens(TOKENS[:2])[0], "their tokens .*</tool>.*think.*here"),
        (with_new_tokens([*TOKENS[:2], "<other>"])[0], "Give the same new tokens, in the same order"),
        (with_new_tokens(train="all")[0], "their train 'rows', here 'all'"),
        (tiny_llama(seed=1, vocab_size=VOCABULARY), "another base model"),
    ):
        before = state(base)
        with pytest.raises(PaCAError, match=message):
            load_adapter(base, tmp_path)
        assert same(state(base), before)
    converted = tiny_llama(vocab_size=VOCABULARY)
    apply_paca(converted, CONFIG)
    with pytest.raises(PaCAError, match="the model was converted without them"):
        load_adapter(converted, tmp_path)


def test_one_of_several_adapters_cannot_have_new_tokens(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    base = tiny_llama(vocab_size=VOCABULARY)
    before = state(base)
    with pytest.raises(PaCAError, match="cannot be one of several by name"):
        load_adapter(base, tmp_path, name="a")
    assert same(state(base), before)
    plain = tiny_llama(vocab_size=VOCABULARY)
    apply_paca(plain, CONFIG)
    save_adapter(plain, tmp_path / "plain")
    with pytest.raises(PaCAError, match="cannot be one of several by name"):
        load_adapter(model, tmp_path / "plain", name="b")


def test_damaged_tokens_are_named(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    file = tmp_path / "paca_lightning.json"
    content = json.loads(file.read_text())
    assert content["new_tokens"] == {"tokens": TOKENS, "ids": NEW, "vocabulary": VOCABULARY, "train": "rows"}
    for change in ({"ids": NEW[::-1]}, {"ids": NEW[:2]}, {"train": "some"}, {"tokens": ["<tool>", 1, "x"]}):
        file.write_text(json.dumps(content | {"new_tokens": content["new_tokens"] | change}))
        with pytest.raises(PaCAError, match=r"is damaged .*new_tokens"):
            load_adapter(tiny_llama(vocab_size=VOCABULARY), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_export_holds_rows_and_tokenizer_and_lora_is_refused(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = with_new_tokens(tie_word_embeddings=tied)
    apply_paca(model, CONFIG)
    with torch.no_grad():
        model.model.embed_tokens.paca_rows.mul_(1.5)
    model.model.embed_tokens.write_rows()
    export_merged(model, tmp_path / "merged", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.vocab_size == VOCABULARY + 3
    assert torch.equal(loaded.get_input_embeddings().weight[NEW], model.model.embed_tokens.paca_rows.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("a<tool>b")[1] == NEW[0]
    with pytest.raises(PaCAError, match=r"LoRA adapter cannot hold new tokens.*export_merged"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
