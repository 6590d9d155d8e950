"""Data that fit the model, and data that do not."""

import json

import pytest
from lightning.pytorch import LightningDataModule
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.instruction import InstructionDataModule
from tests.tasks.runs import VOCABULARY, batches, trainer
from tests.tiny import tiny_model_directory, tiny_tokenizer

# Data and model together


def write_gpt2(directory):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def rows(tmp_path):
    row = {"instruction": "What is your name?", "output": "My name is Ada."}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 4))
    return str(tmp_path / "rows.json")


def run_on(tmp_path, stage, module, tokenizer, **settings):
    data = InstructionDataModule(str(tokenizer), *[rows(tmp_path)] * 3, **{"max_length": 48, **settings})
    return getattr(trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path, stage):
    directory = str(tiny_model_directory(tmp_path / "model", vocab_size=300))
    with pytest.raises(
        PaCAError, match=r"tokenizer .* has \d+ tokens, but the model has 300 embeddings: 'Qu' is number 300"
    ):
        run_on(tmp_path, stage, CausalLMModule(directory), directory)


def test_added_tokens_without_an_embedding_are_refused_if_the_data_may_hold_them(tmp_path):
    tokenizer = tiny_tokenizer()
    directory = tiny_model_directory(tmp_path / "model", vocab_size=len(tokenizer))
    module = CausalLMModule(str(directory))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as Gemma 3 has one
    tokenizer.save_pretrained(tmp_path / "image")
    run_on(tmp_path, "fit", module, tmp_path / "image")
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer.save_pretrained(tmp_path / "padded")
    with pytest.raises(PaCAError, match="'<new pad>' is number"):
        run_on(tmp_path, "fit", module, tmp_path / "padded")


def test_the_tokenizer_of_another_model_is_refused(directory, tmp_path):
    other = ByteLevelBPETokenizer()
    other.train_from_iterator(["To be or not to be"], vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(other.to_str()), eos_token="<eos>").save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(PaCAError, match="is another one than that of the model"):
        run_on(tmp_path, "fit", CausalLMModule(directory), tmp_path / "other", max_length=200)
    # Random weights have learned no words yet.
    run_on(tmp_path, "fit", CausalLMModule(directory, pretrained=False), tmp_path / "other", max_length=200)


def test_a_copy_of_the_models_tokenizer_with_a_token_more_fits(directory, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "copy")
    run_on(tmp_path, "fit", CausalLMModule(directory), tmp_path / "copy")


def test_rows_longer_than_learned_positions_are_refused(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    module = CausalLMModule(str(tmp_path / "gpt2"))
    with pytest.raises(PaCAError, match=r"max_length is 128, but the model has learned 64 positions"):
        run_on(tmp_path, "fit", module, tmp_path / "gpt2", max_length=128)
    run_on(tmp_path, "fit", module, tmp_path / "gpt2", max_length=64)


def test_other_peoples_data_modules_are_only_warned_of(tmp_path):
    class Own(LightningDataModule):
        tokenizer = tiny_tokenizer()

        def train_dataloader(self):
            return DataLoader([{name: t.clamp(max=299) for name, t in b.items()} for b in batches(1)], batch_size=None)

    directory = str(tiny_model_directory(tmp_path / "model", vocab_size=300))
    with pytest.warns(UserWarning, match="Own does not fit the model"):
        trainer(tmp_path).fit(CausalLMModule(directory), datamodule=Own())
