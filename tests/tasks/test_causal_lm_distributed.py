"""Two gloo processes against one: the logged losses, and the loss computed inside a sharded head."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tasks.loss import CausalLMLoss
from tests.distributed_launch import launch
from tests.tasks.runs import adamw, batches
from tests.tiny import tiny_llama, tiny_model_directory

pytestmark = pytest.mark.distributed


def sharded_losses():
    dist.init_process_group("gloo")
    for own_unit in (True, False):
        sharded_loss(dist.get_rank(), own_unit)


def sharded_loss(rank, own_unit):
    model, reference = tiny_llama(), tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    if own_unit:
        fully_shard(model.lm_head)
    fully_shard(model)
    for parameter in [*model.lm_head.parameters(), *reference.lm_head.parameters()]:
        parameter.requires_grad_(False)
    made = list(batches(2))

    step, total = CausalLMLoss(chunk_size=4), 0
    loss, _ = step(model, {"input_ids": made[rank]["input_ids"]}, made[rank]["labels"])
    loss.backward()
    for batch in made:
        expected, _ = CausalLMLoss()(reference, {"input_ids": batch["input_ids"]}, batch["labels"])
        (expected / 2).backward()
        total += expected.detach()
    losses = loss.detach().clone()
    dist.all_reduce(losses)

    assert step.fused
    torch.testing.assert_close(losses, total)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def test_the_loss_is_computed_in_a_sharded_head():
    launch(sharded_losses, 2)


def cpu_trainer(devices, **settings):
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        **settings,
    )


def fit_and_validate(directory, devices):
    """Losses that a trainer logs where rank r takes every so manieth batch from r."""
    rank = int(os.environ["RANK"]) if devices > 1 else 0
    module = CausalLMModule(directory, optimizer=adamw(0.0))
    trainer = cpu_trainer(devices, use_distributed_sampler=False, log_every_n_steps=4 // devices)
    train, validation = (DataLoader(list(batches(count))[rank::devices], batch_size=None) for count in (4, 5))
    trainer.fit(module, train, validation)
    return {name: trainer.callback_metrics[name].item() for name in ("train/loss", "val/loss", "val/perplexity")}


def test_logged_losses_of_two_processes_equal_those_of_one(tmp_path):
    directory = str(tiny_model_directory(tmp_path / "model"))
    expected = fit_and_validate(directory, 1)
    for logged in launch(fit_and_validate, 2, directory, 2):
        assert logged == pytest.approx(expected, rel=1e-6)


def fit_on_rows(directory, devices, rows):
    """Losses with the data module's own loaders, one row a batch."""
    module = CausalLMModule(directory, optimizer=adamw(0.0))
    data = InstructionDataModule(directory, rows, rows, batch_size=1)
    trainer = cpu_trainer(devices, log_every_n_steps=4 - devices)
    trainer.fit(module, data)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    return {name: trainer.callback_metrics[name].item() for name in ("train/loss", "val/loss")}


def test_single_rows_that_do_not_divide_by_the_processes_are_trained_and_measured_once(tmp_path):
    directory = str(tiny_model_directory(tmp_path / "model"))
    rows = [{"instruction": "a" * i, "output": "It is so." * i} for i in (1, 2, 5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = fit_on_rows(directory, 1, str(tmp_path / "rows.jsonl"))
    for logged in launch(fit_on_rows, 2, directory, 2, str(tmp_path / "rows.jsonl")):
        assert logged == pytest.approx(expected, rel=1e-6)
