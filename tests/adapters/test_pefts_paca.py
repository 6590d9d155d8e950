"""PEFT's own PaCA and ours, on one adapter: what PEFT trained computes the same here, and the other way round.

PEFT has PaCA from 0.22 on. With an older one these tests are skipped, and ``test_foreign.py`` stands in for them.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from paca_lightning import PaCAConfig, apply_paca, attach, export_peft_paca, load_adapter, save_adapter
from tests.adapters.test_export import in_bf16, logits
from tests.tiny import tiny_llama

pytestmark = pytest.mark.skipif(
    not hasattr(peft, "PacaConfig"),
    reason=f"PEFT {peft.__version__} has no PaCA: it comes with 0.22, which was not on the registry in November 2026",
)

IDS = torch.arange(32).view(2, 16) * 5
BOTH_DTYPES = pytest.mark.parametrize("cast", [lambda model: model, in_bf16], ids=["fp32", "bf16"])


def assert_computes_the_same(found: nn.Module, expected: nn.Module, base: nn.Module) -> None:
    assert not torch.allclose(logits(expected), logits(base), atol=0.01)  # it was trained
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-5, atol=1e-5)


def train(model: nn.Module, steps: int = 3, lr: float = 0.02) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    handle = attach(optimizer, model)
    for _ in range(steps):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()


@BOTH_DTYPES
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*0\.mlp.*", "random_seed": 7},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]},
    ],
)
def test_what_peft_trained_computes_the_same_here(tmp_path: Path, cast: Any, settings: dict[str, Any]) -> None:
    config = peft.PacaConfig(r=4, paca_alpha=6, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(cast(tiny_llama()), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        theirs.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    ours = cast(tiny_llama())
    load_adapter(ours, tmp_path)
    assert_computes_the_same(ours, theirs, cast(tiny_llama()))


@BOTH_DTYPES
@pytest.mark.parametrize(
    "config",
    [
        PaCAConfig(r=4, alpha=6),
        PaCAConfig(r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 2}),
        PaCAConfig(r=4, target_modules=r".*1\..*_proj", modules_to_save=["lm_head", "model.norm"]),
    ],
)
def test_what_we_trained_computes_the_same_in_peft(tmp_path: Path, cast: Any, config: PaCAConfig) -> None:
    ours = cast(tiny_llama())
    apply_paca(ours, config)
    train(ours)
    export_peft_paca(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(cast(tiny_llama()), tmp_path)
    assert_computes_the_same(theirs, ours, cast(tiny_llama()))
    assert_computes_the_same(theirs.merge_and_unload(), ours, cast(tiny_llama()))


def test_an_adapter_directory_of_ours_is_one_of_pefts(tmp_path: Path) -> None:
    """What ``save_adapter`` writes, where all layers have one rank and names mean the same in PEFT."""
    ours = tiny_llama()
    apply_paca(ours, PaCAConfig(r=4, alpha=6, target_modules=["q_proj", "up_proj"]))
    train(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_computes_the_same(theirs, ours, tiny_llama())


def test_peft_trains_on_what_we_exported_and_we_on_what_it_saved(tmp_path: Path) -> None:
    ours = tiny_llama()
    apply_paca(ours, PaCAConfig(r=4, alpha=6))
    train(ours)
    export_peft_paca(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    theirs.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    before = copy.deepcopy(ours)
    load_adapter(ours, tmp_path / "theirs")
    assert_computes_the_same(ours, theirs, before)
    train(ours)
