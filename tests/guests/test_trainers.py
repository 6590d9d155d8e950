"""Loops and trainers of other libraries around one small model: a fit, a resume, an adapter's round trip, a merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from paca_lightning import (
    PaCAConfig,
    PaCATrainerCallback,
    apply_paca,
    attach,
    load_adapter,
    merge,
    save_adapter,
)
from paca_lightning.adapters.state_dict import keep_trained_state
from paca_lightning.layers.base import PaCALayer
from tests import tiny
from tests.guests.checks import is_written, same_state
from tests.guests.models import IDS
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.guests
CONFIG = PaCAConfig(r=4)
STEPS = 4

# A way to train: builds a model, trains it for STEPS steps, and leaves a checkpoint of the middle in a directory, or
# goes on from the one that another run left there.
Way = Callable[[Path, bool], nn.Module]


def batch(step: int) -> Tensor:
    return IDS[2 * step : 2 * step + 2]


def converted() -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def plain_loop(path: Path, resume: bool) -> nn.Module:
    model, optimizer = converted()
    keep_trained_state(model)
    attach(optimizer, model)
    begin = 0
    if resume:
        begin = STEPS // 2
        state = torch.load(path / "state.pt")
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    for step in range(begin, STEPS):
        if step == STEPS // 2 and not resume:
            path.mkdir()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / "state.pt")
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def fabric_loop(path: Path, resume: bool) -> nn.Module:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    model, optimizer = converted()
    keep_trained_state(model)
    attach(optimizer, model)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    state = {"model": wrapped, "optimizer": wrapped_optimizer}
    if resume:
        fabric.load(path / "state.ckpt", state, strict=False)
    for step in range(STEPS // 2 if resume else 0, STEPS):
        if step == STEPS // 2 and not resume:
            fabric.save(path / "state.ckpt", state)
        fabric.backward(wrapped(input_ids=batch(step), labels=batch(step)).loss)
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
    return model


def accelerate_loop(path: Path, resume: bool) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = converted()
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    attach(wrapped_optimizer, wrapped)
    if resume:
        accelerator.load_state(str(path))
    for step in range(STEPS // 2 if resume else 0, STEPS):
        if step == STEPS // 2 and not resume:
            accelerator.save_state(str(path))
        accelerator.backward(wrapped(input_ids=batch(step), labels=batch(step)).loss)
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
    return model


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "save_steps": STEPS // 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 1,
}


def run(trainer: Any, path: Path, resume: bool) -> nn.Module:
    trainer.train(resume_from_checkpoint=str(path / f"checkpoint-{STEPS // 2}") if resume else None)
    model: nn.Module = trainer.model
    return model


def output_of(path: Path, resume: bool) -> str:
    return str(path.with_name("resumed") if resume else path)


def hugging_face(path: Path, resume: bool) -> nn.Module:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        model=tiny_llama(),
        args=TrainingArguments(output_dir=output_of(path, resume), **SETTINGS),
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
        callbacks=[PaCATrainerCallback(CONFIG)],
    )
    return run(trainer, path, resume)


def supervised(path: Path, resume: bool) -> nn.Module:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(output_dir=output_of(path, resume), max_length=32, **SETTINGS),
        train_dataset=Dataset.from_dict({"text": [f"The fox number {number} jumps." for number in range(8)]}),
        processing_class=tiny_tokenizer(),
        callbacks=[PaCATrainerCallback(CONFIG)],
    )
    return run(trainer, path, resume)


def preferences(path: Path, resume: bool) -> nn.Module:
    """The reference is the model before training: precomputed, so that no second model is needed."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    count = range(8)
    rows = {
        "prompt": [f"What is {n}?" for n in count],
        "chosen": [f" It is {n}." for n in count],
        "rejected": [" A dog." for _ in count],
    }
    trainer = trl.DPOTrainer(
        model=tiny_llama(),
        args=trl.DPOConfig(
            output_dir=output_of(path, resume), max_length=48, precompute_ref_log_probs=True, **SETTINGS
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[PaCATrainerCallback(CONFIG)],
    )
    return run(trainer, path, resume)


TRAINERS: dict[str, tuple[Way, str]] = {
    "a plain PyTorch loop": (plain_loop, "torch"),
    "Fabric": (fabric_loop, "lightning"),
    "Accelerate": (accelerate_loop, "accelerate"),
    "Hugging Face's Trainer": (hugging_face, "transformers"),
    "TRL's SFTTrainer": (supervised, "trl"),
    "TRL's DPOTrainer": (preferences, "trl"),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")  # TRL's
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_fits_resumes_saves_and_merges(name: str, tmp_path: Path) -> None:
    way, _ = TRAINERS[name]
    model = way(tmp_path / "whole", False)
    assert is_written(model)
    assert same_state(way(tmp_path / "whole", True), model)

    save_adapter(model, tmp_path / "adapter")
    loaded = tiny_llama()
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    expected = logits(model)
    merge(model)
    assert not any(isinstance(part, PaCALayer) for part in model.modules())
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")  # TRL's
@pytest.mark.parametrize("way", [supervised, preferences])
def test_trl_takes_a_model_that_was_converted_before(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = way(tmp_path / "by callback", False)
    monkeypatch.setattr(f"{__name__}.tiny_llama", converted_llama)
    monkeypatch.setattr(f"{__name__}.CONFIG", None)  # the callback takes that of the model
    found = way(tmp_path / "before", False)
    assert is_written(found)
    assert same_state(found, expected)


def converted_llama() -> Any:
    model = tiny.tiny_llama()  # not this module's name, which a test replaces
    apply_paca(model, PaCAConfig(r=4))
    return model
