"""New tokens in runs: data and module agree, training, resuming, commands with the adapter, and mistakes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from peft import LoraConfig
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from paca_lightning import (
    AdapterCheckpoint,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    PEFTStrategy,
    add_new_tokens,
    load_adapter,
)
from paca_lightning.layers.rows import row_modules
from paca_lightning.tasks import CausalLMModule, InstructionDataModule, PreferenceDataModule, PreferenceModule
from paca_lightning.tasks.data.new_tokens import extend_tokenizer, give_new_tokens
from paca_lightning.tools.export import export
from paca_lightning.tools.generate import generate
from paca_lightning.tools.model_with_adapters import ModelWithAdapters
from tests.new_tokens import NEW, TOKENS, VOCABULARY
from tests.tasks.preferences import pairs
from tests.tasks.rows import chat, write_rows
from tests.tasks.runs import adamw, batches, trainer
from tests.tiny import tiny_llama, tiny_model_directory, tiny_tokenizer

CONFIG = PaCAConfig(r=4)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without spare rows, and its tokenizer."""
    path = tmp_path_factory.mktemp("base") / "model"
    return str(tiny_model_directory(path, vocab_size=VOCABULARY, tie_word_embeddings=request.param))


def rows(tmp_path: Path) -> str:
    texts = ("<tool>sum</tool> is 3", "<think>so</tool>", "no token of the new kind", "<tool><think>")
    return str(write_rows(tmp_path / "rows.jsonl", [chat(f"ask {i}", text) for i, text in enumerate(texts * 2)]))


def data(base: str, tmp_path: Path, **settings: Any) -> InstructionDataModule:
    return InstructionDataModule(base, rows(tmp_path), batch_size=2, cache_dir=str(tmp_path / "cache"), **settings)


def module(base: str, **settings: Any) -> CausalLMModule:
    return CausalLMModule(base, **({"new_tokens": TOKENS, "optimizer": adamw(1e-2)} | settings))


def fit(tmp_path: Path, module: LightningModule, data: Any, *callbacks: Any, **settings: Any) -> Trainer:
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(tmp_path, callbacks=list(callbacks), logger=False, **settings)
    run.fit(module, data, ckpt_path=ckpt_path)
    return run


def trained(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_trains_the_tokens_of_its_data_and_writes_what_the_commands_use(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, adapter = data(base, tmp_path), tmp_path / "adapter"
    saving = ModelCheckpoint(tmp_path, "run", save_weights_only=True)
    callbacks = PaCAStrategy(CONFIG), AdapterCheckpoint(str(adapter)), saving
    fit(tmp_path, lm := module(base), made, *callbacks, enable_checkpointing=True)
    ids = made.splits["train"].dataset["input_ids"]
    assert {number for row in ids for number in row} >= set(NEW)
    assert lm.model is not None
    table = lm.model.get_input_embeddings().weight
    assert not torch.equal(table[NEW[0]], table[NEW[1]])  # they began alike

    models = ModelWithAdapters(base, [str(adapter)])
    assert models.tokenizer(models.names[0]).encode("a<tool>")[-1] == NEW[0]
    batch = torch.tensor([ids[0]])
    assert torch.equal(models.model(input_ids=batch).logits, lm.model.eval()(input_ids=batch).logits)
    generate(base, "ask", adapter=str(adapter), max_new_tokens=2)
    from_checkpoint = ModelWithAdapters(base, [str(tmp_path / "run.ckpt")])
    assert from_checkpoint.tokenizer(from_checkpoint.names[0]).encode("a<tool>")[-1] == NEW[0]
    assert torch.equal(from_checkpoint.model(input_ids=batch).logits, models.model(input_ids=batch).logits)

    export(base, str(adapter), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.get_input_embeddings().weight[NEW], table[NEW].bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("</tool>") == [NEW[1]]
    with pytest.raises(PaCAError, match="LoRA adapter cannot hold new tokens"):
        export(base, str(adapter), str(tmp_path / "lora"), format="lora")
    with pytest.raises(PaCAError, match="cannot be one of several by name"):
        ModelWithAdapters(base, [f"a={adapter}", f"b={adapter}"])


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_ends_bitwise_alike(base: str, tmp_path: Path, full: bool) -> None:
    whole, resumed = module(base), module(base)
    paca = {"full_checkpoints": full}
    fit(tmp_path, whole, data(base, tmp_path), PaCAStrategy(CONFIG, **paca))
    saving, saved = ModelCheckpoint(tmp_path, "two", every_n_train_steps=2), tmp_path / "two.ckpt"
    first = PaCAStrategy(CONFIG, **paca), saving
    fit(tmp_path, module(base), data(base, tmp_path), *first, max_steps=2, enable_checkpointing=True)
    fit(tmp_path, resumed, data(base, tmp_path), PaCAStrategy(CONFIG, **paca), ckpt_path=str(saved))
    assert same(trained(resumed), trained(whole))
    for other, message in (
        ({"new_tokens": [*TOKENS[:2], "<other>"]}, "trained with other new tokens than the model has"),
        ({"new_tokens": None}, r"it was trained with new tokens.*new_tokens: \['<tool>'"),
    ):
        with pytest.raises(PaCAError, match=message):
            fit(tmp_path, module(base, **other), data(base, tmp_path), PaCAStrategy(CONFIG), ckpt_path=str(saved))


def test_a_run_begins_from_an_adapter_with_its_tokens_and_not_without(base: str, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    fit(tmp_path, first := module(base), data(base, tmp_path), PaCAStrategy(CONFIG), AdapterCheckpoint(adapter))
    second = module(base)
    run = trainer(tmp_path, callbacks=[PaCAStrategy(adapter=adapter)], logger=False, max_steps=0)
    run.fit(second, data(base, tmp_path))
    assert same(trained(second), trained(first))
    with pytest.raises(PaCAError, match=r"Give them to the module, so that the data get them"):
        fit(tmp_path, module(base, new_tokens=None), data(base, tmp_path), PaCAStrategy(adapter=adapter))


def test_averaged_rows_are_written_into_the_averaged_weights(base: str, tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5)
    run = fit(tmp_path, lm := module(base, dtype="bfloat16"), data(base, tmp_path), PaCAStrategy(CONFIG), average)
    assert run.global_step == 4
    modules = dict(row_modules(lm))
    assert modules
    for each in modules.values():
        assert torch.equal(each.weight[NEW], each.paca_rows.bfloat16())


def test_full_fine_tuning_trains_them_too_and_other_methods_refuse(base: str, tmp_path: Path) -> None:
    fit(tmp_path, lm := module(base), data(base, tmp_path), max_steps=1)
    assert lm.model is not None
    assert lm.model.get_input_embeddings().weight.grad is not None
    lora = PEFTStrategy(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PaCAError, match="PEFTStrategy does not train the rows of new tokens"):
        fit(tmp_path, module(base), data(base, tmp_path), lora)


def test_preferences_may_hold_new_tokens(base: str, tmp_path: Path) -> None:
    source = [
        {name: f"{value} <tool>" if name == "chosen" else value for name, value in row.items()} for row in pairs(4)
    ]
    made = PreferenceDataModule(
        base, str(write_rows(tmp_path / "pairs.jsonl", source)), batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    lm = PreferenceModule(base, new_tokens=["<tool>"], optimizer=adamw(1e-2))
    fit(tmp_path, lm, made, PaCAStrategy(CONFIG), max_steps=2)
    assert lm.model is not None
    mean = lm.model.get_input_embeddings().weight[:VOCABULARY].mean(0)
    assert not torch.allclose(lm.model.get_input_embeddings().weight[VOCABULARY], mean)


def test_all_trains_the_embedding_whole_and_its_adapter_loads_into_the_base(base: str, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    lm = module(base, new_tokens_train="all")
    fit(tmp_path, lm, data(base, tmp_path), PaCAStrategy(CONFIG), AdapterCheckpoint(adapter), max_steps=2)
    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(model, adapter)
    assert lm.model is not None
    assert torch.equal(model.get_input_embeddings().weight, lm.model.get_input_embeddings().weight)
    assert not torch.equal(
        model.get_input_embeddings().weight[:5], tiny_llama(vocab_size=VOCABULARY).lm_head.weight[:5]
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("<tool>", "new_tokens must be a list"),
        (["<tool>", "<tool>"], "'<tool>' twice"),
        (["<tool>", ""], "holds ''"),
        (["<tool>", 3], "holds 3"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_at_once(base: str, tokens: Any, message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        module(base, new_tokens=tokens)


def test_an_unknown_way_to_train_them_is_refused(base: str) -> None:
    with pytest.raises(PaCAError, match="new_tokens_train='some' is unknown"):
        module(base, new_tokens_train="some")


def test_a_token_that_is_there_already_is_refused_before_the_data_are_read(base: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"has '<\|im_end\|>' already, as number 1"):
        fit(tmp_path, module(base, new_tokens=["<|im_end|>"]), data(base, tmp_path), PaCAStrategy(CONFIG))


def test_a_tokenizer_that_splits_a_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("a<", special=True)])  # found first in "a<one>a"
    with pytest.raises(PaCAError, match="does not take '<one>' for one token, but splits it"):
        add_new_tokens(tiny_llama(), tokenizer, ["<one>"])


def test_data_of_another_tokenizer_are_refused(base: str, tmp_path: Path) -> None:
    class Own(LightningDataModule):
        tokenizer = AutoTokenizer.from_pretrained(base)

        def train_dataloader(self) -> Any:
            return batches()

    with pytest.raises(PaCAError, match=r"the tokenizer .* of the data lacks '<tool>'.*extend_tokenizer"):
        fit(tmp_path, module(base), Own(), PaCAStrategy(CONFIG))
    lm = module(base)
    lm.configure_model()  # with the model's tokenizer
    other = tiny_tokenizer()
    other.add_tokens(["<between>"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(PaCAError, match=r"numbers them \[351, 352, 353\], and the model has them as \[350, 351, 352\]"):
        fit(tmp_path, lm, data(str(tmp_path / "other"), tmp_path), PaCAStrategy(CONFIG))


def test_prepared_data_depend_on_the_tokens(base: str, tmp_path: Path) -> None:
    rows_of = {}
    made = data(base, tmp_path)
    for tokens in ([], TOKENS):
        give_new_tokens(made, tokens)
        made.setup("fit")
        rows_of[len(tokens)] = made.splits["train"].dataset["input_ids"]
    assert max(number for row in rows_of[0] for number in row) < VOCABULARY <= max(n for row in rows_of[3] for n in row)


def test_new_tokens_are_found_anywhere_and_stay_in_decoded_text() -> None:
    tokenizer = tiny_tokenizer()
    assert extend_tokenizer(tokenizer, TOKENS) == NEW
    text = "x<tool> </tool>y<think>"
    assert [number for number in tokenizer.encode(text) if number >= VOCABULARY] == NEW
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_models_with_unusual_embeddings_are_refused_by_name() -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(PaCAError, match="its input embedding, a Embedding, has max_norm"):
        add_new_tokens(model, tiny_tokenizer(), TOKENS)
    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=1, **settings))
    with pytest.raises(PaCAError, match=r"a Gemma2TextScaledWordEmbedding, does more than look up rows .*: all"):
        add_new_tokens(gemma, tiny_tokenizer(), TOKENS)
    add_new_tokens(gemma, tiny_tokenizer(), TOKENS, train="all")
    model = tiny_llama(vocab_size=VOCABULARY)
    model.lm_head = torch.nn.Linear(64, VOCABULARY)
    with pytest.raises(PaCAError, match=r"its output head, a Linear, has a bias .new_tokens_train: all"):
        add_new_tokens(model, tiny_tokenizer(), TOKENS)
    add_new_tokens(model, tiny_tokenizer(), TOKENS, train="all")
    with pytest.raises(PaCAError, match="has new tokens already: '<tool>'"):
        add_new_tokens(model, tiny_tokenizer(), ["<x>"])
