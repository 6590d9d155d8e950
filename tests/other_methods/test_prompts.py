"""Prompt methods and the loss of CausalLMModule: as PEFT computes it alone, or refused."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

from paca_lightning import PaCAError
from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.other_methods.peft_model import adapt
from paca_lightning.tasks.loss import CausalLMLoss
from tests.peft_warnings import PREFIXES
from tests.tiny import tiny_llama

pytestmark = PREFIXES

PROMPT = peft.PromptTuningConfig(num_virtual_tokens=5)
P_TUNING = peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16)
PREFIX = peft.PrefixTuningConfig(num_virtual_tokens=5)
IDS = torch.randint(3, 384, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9)[None] < torch.tensor([[9], [6], [4]])
LABELS = IDS.masked_fill(~MASK, -100).index_fill(1, torch.tensor([0, 1]), -100)


def adapted(config: peft.PeftConfig, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.model = tiny_llama() if model is None else model
    adapt(module, config)
    return module.model


@pytest.mark.parametrize("config", [PROMPT, P_TUNING, PREFIX], ids=["prompt", "p-tuning", "prefix"])
def test_loss_and_gradients_equal_those_that_peft_computes(config: peft.PeftConfig) -> None:
    ours, theirs = adapted(config), adapted(config)
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK.long()}
    loss = CausalLMLoss()
    total, tokens = loss(ours, inputs, LABELS)
    assert loss.fused
    (total / tokens).backward()
    # PEFT pads the labels, and the model computes the loss of all rows of logits.
    expected = theirs(**inputs, labels=LABELS).loss
    expected.backward()
    torch.testing.assert_close(total / tokens, expected)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        if reference.requires_grad:
            torch.testing.assert_close(mine.grad, reference.grad)
    assert ours(**inputs).logits.shape == (3, 9, 384)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT, of those that generate makes
def test_generation_goes_through_the_prompt() -> None:
    model = adapted(PROMPT).eval()
    settings: dict[str, Any] = {"attention_mask": MASK[:1].long(), "max_new_tokens": 3, "do_sample": False}
    generated = model.generate(input_ids=IDS[:1], eos_token_id=None, **settings)
    with torch.no_grad():
        first = model(input_ids=IDS[:1]).logits[0, -1].argmax()
    assert generated[0, 9] == first


@pytest.mark.parametrize("config", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_packed_rows_are_refused(config: peft.PeftConfig) -> None:
    with pytest.raises(PaCAError, match="Set packing: false"):
        adapted(config)(input_ids=IDS, position_ids=torch.arange(9)[None].expand(3, 9))


def test_a_prefix_under_activation_checkpointing_is_refused() -> None:
    model = tiny_llama()
    checkpoint_blocks(find_blocks(model))
    with pytest.raises(PaCAError, match="activation checkpointing drops"):
        adapted(PREFIX, model)


def test_a_module_without_a_language_model_is_refused() -> None:
    with pytest.raises(PaCAError, match="the module has none"):
        adapt(nn.Sequential(nn.Linear(4, 4)), PROMPT)
