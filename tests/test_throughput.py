import time

import pytest
import torch
from lightning.pytorch import Callback
from transformers import GPT2Config, GPT2LMHeadModel

from paca_lightning.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.throughput import TokenThroughput, flops_per_token
from tests.test_causal_lm import batches, trainer
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


class Slow(Callback):
    """Takes 20 ms over each training batch and a second over validation."""

    def on_train_batch_start(self, *args):
        time.sleep(0.02)

    def on_validation_batch_start(self, *args):
        time.sleep(1.0)


def test_logs_tokens_per_second_without_padding_and_validation(tmp_path):
    directory = str(tiny_model_directory(tmp_path / "model"))
    run = trainer(
        tmp_path,
        callbacks=[Slow(), TokenThroughput(peak_flops=1e9)],
        log_every_n_steps=6,
        val_check_interval=3,
        limit_val_batches=1,
        num_sanity_val_steps=1,
    )
    module = CausalLMModule(directory)
    run.fit(module, batches(6), batches(1))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches(6))
    speed = float(run.callback_metrics["train/tokens_per_second"])
    assert tokens / 1.0 < speed < tokens / 0.12  # at least 6 x 20 ms, and not the second of validation

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


def test_a_peak_that_is_none_is_refused():
    with pytest.raises(PaCAError, match="peak_flops"):
        TokenThroughput(peak_flops=0)
