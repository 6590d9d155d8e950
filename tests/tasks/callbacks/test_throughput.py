from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from paca_lightning import PaCAConfig, apply_paca
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.tokens import count_tokens
from paca_lightning.tasks.callbacks import throughput
from paca_lightning.tasks.callbacks.throughput import TokenThroughput, flops_per_token
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.collate import Documents, PadCollator
from tests.moe import tiny_moe, tokens
from tests.tasks.runs import batches, trainer
from tests.tiny import tiny_llama, tiny_model_directory


def test_flops_are_those_that_the_operations_add_up_to():
    from torch.utils.flop_counter import FlopCounterMode

    length = 32
    model = tiny_llama(attn_implementation="eager")
    ids = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # Rotary embedding is a small product that the formula leaves out.
    assert counter.get_total_flops() == pytest.approx(length * flops_per_token(model, length), rel=0.01)


def test_flops_of_frozen_weights_are_four_each():
    model = tiny_llama().requires_grad_(False)
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert flops_per_token(model, 0) == 4 * weights
    model.lm_head.requires_grad_(True)
    assert flops_per_token(model, 0) == 4 * weights + 2 * model.lm_head.weight.numel()


def test_flops_of_gpt2s_transposed_layers_count():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).requires_grad_(False)
    assert flops_per_token(model, 0) == 4 * (8 * 24 + 8 * 8 + 2 * 8 * 32 + 8 * 16)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("trained", ["nothing", "columns", "all"])
def test_flops_of_experts_are_those_of_the_experts_that_a_token_takes(kind, trained):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_moe(kind, "eager", attn_implementation="eager").requires_grad_(trained == "all")
    if trained == "columns":
        apply_paca(model, PaCAConfig(r=4))
    length = 24
    with FlopCounterMode(display=False) as counter:
        embedded = model.get_input_embeddings()(tokens(0, 1, length)).detach().requires_grad_(True)
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    with FlopCounterMode(display=False) as rotary:  # a product before transformers 5.19, which the formula leaves out
        model.model.rotary_emb(embedded, torch.arange(length)[None])
    routers = 2 * 2 * 2 * 4 * 32 + (trained == "all") * 2 * 2 * 4 * 32  # two blocks, four experts, 32 features
    linears = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.bias is not None]
    biases = sum(
        2 * part.bias.numel() for part in linears if trained == "all"
    )  # a sum each, that PyTorch does not count
    expected = flops_per_token(model, length) - biases + routers
    assert counter.get_total_flops() == length * expected + rotary.get_total_flops()


def test_experts_without_a_number_per_token_are_refused():
    model = tiny_moe("mixtral")
    model.model.layers[0].mlp.experts.config = SimpleNamespace()
    with pytest.raises(PaCAError, match=r"FLOPs of 'model\.layers\.0\.mlp\.experts' are unknown.*num_experts_per_tok"):
        flops_per_token(model, 8)


def test_flops_of_attention_are_those_of_the_first_hugging_face_config():
    outer = torch.nn.Module()
    outer.config, outer.model = {"a": 1}, tiny_llama()
    assert flops_per_token(outer, 32) == flops_per_token(outer.model, 32)
    del outer.model
    assert flops_per_token(outer, 32) == 0


@pytest.mark.parametrize("per_row", [[1, 1, 1], [2, 1], [3]])
@pytest.mark.parametrize("packed", [True, False])
def test_padding_does_not_count_however_batches_are_made(per_row, packed):
    lengths = np.array([5, 3, 6])
    trained = np.arange(14) % 3 == 1  # of each document, one at least
    documents = Documents(np.arange(14) + 1, trained, lengths, np.array(per_row))
    batch = PadCollator(0, pad_to_multiple_of=7, packed=packed)(documents)
    assert batch["input_ids"].numel() >= 14
    assert count_tokens(batch) == 14


class Clock(Callback):
    """Stands at 0, and goes on by a second before training, 20 ms in each training batch, a second in validation."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def on_train_start(self, *args):
        self.now += 1.0

    def on_train_batch_start(self, *args):
        self.now += 0.02

    def on_validation_batch_start(self, *args):
        self.now += 1.0


def test_logs_tokens_per_second_without_padding_and_what_is_not_training(tmp_path, monkeypatch):
    directory, clock = str(tiny_model_directory(tmp_path / "model")), Clock()
    monkeypatch.setattr(throughput, "time", clock)
    run = trainer(
        tmp_path,
        callbacks=[TokenThroughput(peak_flops=1e9), clock],
        log_every_n_steps=6,
        val_check_interval=3,
        limit_val_batches=1,
        num_sanity_val_steps=1,
    )
    module = CausalLMModule(directory)
    run.fit(module, batches(6), batches(1))
    assert clock.now == pytest.approx(1 + 6 * 0.02 + 3)  # validation in the sanity check and twice in training
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches(6))
    speed = float(run.callback_metrics["train/tokens_per_second"])
    assert speed == pytest.approx(tokens / (6 * 0.02))

    flops = sum(
        int(batch["attention_mask"].sum()) * flops_per_token(module, batch["input_ids"].shape[1])
        for batch in batches(6)
    )
    assert float(run.callback_metrics["train/mfu"]) == pytest.approx(flops / tokens * speed / 1e9, rel=1e-5)


def test_no_mfu_where_the_peak_is_unknown(tmp_path):
    run = trainer(tmp_path, callbacks=[TokenThroughput()])
    run.fit(CausalLMModule(str(tiny_model_directory(tmp_path / "model"))), batches(2))
    assert "train/tokens_per_second" in run.callback_metrics
    assert "train/mfu" not in run.callback_metrics


class Counting(LightningModule):
    """Trains on batches of any kind."""

    def training_step(self, batch):
        raise AssertionError("training has begun")

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("batch", "found"), [(torch.ones(3), "a Tensor"), ({"x": torch.ones(3)}, "the keys \\['x'\\]")]
)
def test_batches_without_token_ids_are_refused(batch, found, tmp_path):
    with pytest.raises(PaCAError, match=f"`input_ids` .*, and there is {found}"):
        trainer(tmp_path, callbacks=[TokenThroughput()]).fit(Counting(), DataLoader([batch], batch_size=None))


def test_a_peak_that_is_none_is_refused():
    with pytest.raises(PaCAError, match="peak_flops"):
        TokenThroughput(peak_flops=0)
