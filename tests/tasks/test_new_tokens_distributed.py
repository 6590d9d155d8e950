"""New tokens on two processes: the same training as on one, with DDP and sharded; and checkpoints of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAStrategy, load_adapter
from paca_lightning.core.dtensor import whole_tensor
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.tasks import CausalLMModule, InstructionDataModule
from tests.distributed_launch import launch
from tests.new_tokens import NEW, TOKENS, VOCABULARY
from tests.tasks.rows import chat, write_rows
from tests.tasks.runs import adamw
from tests.tiny import tiny_llama, tiny_model_directory

pytestmark = pytest.mark.distributed

SETTINGS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tie_word_embeddings": True}}


def fit(directory: Path, kind: str, name: str, strategy: Any, devices: int, resume: bool = False) -> dict[str, Tensor]:
    """Train for an epoch of four steps, or from the middle of one. Returns what is trained, and rows of the weight."""
    saving = ModelCheckpoint(directory / name, "half", every_n_train_steps=2, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), AdapterCheckpoint(str(directory / name / "adapter")), saving],
        default_root_dir=directory,
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # A rank alone would have the gradient of one of three tokens, or none.
    texts = ("<tool>sum</tool> is 3", "no such token", "<think>so<think>", "as short")
    source = write_rows(directory / f"{name}.jsonl", [chat(f"ask {i}", text) for i, text in enumerate(texts * 4)])
    data = InstructionDataModule(
        str(directory / kind), str(source), batch_size=4 // devices, cache_dir=str(directory / name / "cache")
    )
    module = CausalLMModule(str(directory / kind), new_tokens=TOKENS, optimizer=adamw(1e-2))
    trainer.fit(module, data, ckpt_path=_saved(directory / name) if resume else None)
    assert module.model is not None
    state = {n: whole_tensor(p) for n, p in module.model.named_parameters() if p.requires_grad or "embed" in n}
    return state | {"lm_head.weight": whole_tensor(module.model.lm_head.weight)}


def _saved(directory: Path) -> Path:
    return next(path for path in directory.glob("half*.ckpt"))


def on_two_ranks(directory: Path, kind: str) -> dict[str, dict[str, Tensor]]:
    found = {
        "ddp": fit(directory, kind, "ddp", "ddp", 2),
        "fsdp2": fit(directory, kind, "fsdp2", FSDP2Strategy(), 2),
    }
    return found | {"resumed": fit(directory, kind, "fsdp2", FSDP2Strategy(), 2, resume=True)}


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_two_processes_train_what_one_does(tmp_path: Path, kind: str) -> None:
    tiny_model_directory(tmp_path / kind, vocab_size=VOCABULARY, **SETTINGS[kind])
    one = fit(tmp_path, kind, "one", "auto", 1)
    first, second = launch(on_two_ranks, 2, tmp_path, kind)
    table = one["model.embed_tokens.weight"]
    assert torch.equal(table[NEW], one["model.embed_tokens.paca_rows"])
    for found in (first, second):
        for run in ("ddp", "fsdp2"):
            assert found[run].keys() == one.keys()
            for name, value in one.items():
                torch.testing.assert_close(found[run][name], value, rtol=0, atol=1e-5, msg=f"{run}: {name}")
        for name, value in found["fsdp2"].items():
            assert torch.equal(found["resumed"][name], value), name
    for source in (tmp_path / "fsdp2" / "adapter", _saved(tmp_path / "fsdp2")):
        model = tiny_llama(vocab_size=VOCABULARY, **SETTINGS[kind])
        load_adapter(model, source)
        if source.name == "adapter":
            assert torch.equal(model.model.embed_tokens.weight, first["fsdp2"]["model.embed_tokens.weight"])
            assert torch.equal(model.lm_head.weight, first["fsdp2"]["lm_head.weight"])
