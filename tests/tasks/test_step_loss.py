"""The gradient of an optimizer step against that of one large batch with the step's rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.batch import model_inputs
from paca_lightning.tasks.instruction import InstructionDataModule
from tests.distributed_launch import launch
from tests.tasks.runs import adamw, batches, trainer
from tests.tiny import tiny_model_directory

Step = tuple[list[dict[str, Tensor]], list[Tensor]]


class Steps(Callback):
    """Notes the batches and the gradients of each optimizer step of this rank."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.batches: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in gradients if g is not None]
        self.steps.append((self.batches, whole))
        self.batches = []


def gradients_of_one_batch(directory: str, made: list[dict[str, Tensor]]) -> list[Tensor]:
    """The gradient of the mean over all trained tokens, by the Hugging Face model alone."""
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    total, tokens = torch.zeros(()), 0
    for batch in made:
        logits = model(**model_inputs(batch), use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        tokens += int((targets != -100).sum())
    (total / tokens).backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_steps_are_those_of_one_batch(directory: str, ranks: list[list[Step]], steps: int) -> None:
    assert [len(rank) for rank in ranks] == [steps] * len(ranks)
    for of_ranks in zip(*ranks, strict=True):
        expected = gradients_of_one_batch(directory, [batch for made, _ in of_ranks for batch in made])
        for _, gradients in of_ranks:
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-7)


def rows_of(path: Path, words: tuple[int, ...] = (39, 2, 39, 2, 1, 20, 7)) -> str:
    """Conversations whose answers differ in length."""
    rows = [{"instruction": f"Say {count}.", "output": "yes " * count} for count in words]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def train(directory: str, data: Any, devices: int = 1, **settings: Any) -> list[Step]:
    """Train for an epoch without changing the weights."""
    noted, module = Steps(), CausalLMModule(directory, optimizer=adamw(0.0), **settings.pop("module", {}))
    defaults = {"devices": devices, "logger": False, "callbacks": [noted], "accumulate_grad_batches": 4}
    run = trainer(Path(directory), **(defaults | settings))
    run.fit(
        module, **({"datamodule": data} if isinstance(data, InstructionDataModule) else {"train_dataloaders": data})
    )
    return noted.steps


@pytest.mark.parametrize(
    ("packing", "batch_size", "accumulate"), [(False, 1, 4), (False, 2, 3), (True, 1, 4), (True, 2, 2)]
)
def test_accumulated_steps_and_a_short_last_one_are_those_of_one_batch(
    directory: str, tmp_path: Path, packing: bool, batch_size: int, accumulate: int
) -> None:
    data = InstructionDataModule(
        directory,
        rows_of(tmp_path / "rows.jsonl"),
        batch_size=batch_size,
        packing=packing,
        max_length=96 if packing else 512,
        cache_dir=str(tmp_path),
    )
    steps = train(directory, data, accumulate_grad_batches=accumulate)
    assert len(steps[-1][0]) < accumulate == len(steps[0][0])
    assert_steps_are_those_of_one_batch(directory, [steps], len(steps))


def test_a_loader_that_does_not_know_its_tokens_trains_the_same_steps(directory: str) -> None:
    steps = train(directory, batches(6))
    assert [len(made) for made, _ in steps] == [4, 2]
    assert_steps_are_those_of_one_batch(directory, [steps], 2)


def test_means_of_micro_batches_remain_as_a_setting(directory: str) -> None:
    ((made, gradients),) = train(directory, batches(2), module={"loss_normalization": "batch"})
    expected = [gradients_of_one_batch(directory, [batch]) for batch in made]
    means = [sum(of_batches) / 4 for of_batches in zip(*expected, strict=True)]  # type: ignore[arg-type]
    torch.testing.assert_close(gradients, means, rtol=1e-4, atol=1e-7)

    with pytest.raises(PaCAError, match=r"loss_normalization='sum' is unknown. Choose tokens or batch"):
        CausalLMModule(directory, loss_normalization="sum")  # type: ignore[arg-type]


def test_clipping_sees_the_gradient_of_the_step(directory: str, tmp_path: Path) -> None:
    class Clipped(CausalLMModule):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.clipped = [parameter.grad.clone() for parameter in self.parameters()]

    module, noted = Clipped(directory, optimizer=adamw(0.0)), Steps()
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "callbacks": [noted], "logger": False}
    trainer(tmp_path, **settings).fit(module, batches(2))
    norm = torch.nn.utils.get_total_norm(noted.steps[0][1])
    expected = [gradient * (1e-3 / (norm + 1e-6)) for gradient in noted.steps[0][1]]
    torch.testing.assert_close(module.clipped, expected)


def test_a_run_resumed_within_a_step_takes_the_mean_over_the_rest_of_it(directory: str, tmp_path: Path) -> None:
    class SaveWithinStep(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.fit_loop.batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    def data() -> InstructionDataModule:
        return InstructionDataModule(
            directory, rows_of(tmp_path / "rows.jsonl"), batch_size=1, cache_dir=str(tmp_path / "cache")
        )

    whole = train(directory, data(), callbacks=[noted := Steps(), SaveWithinStep()])
    assert whole == []
    assert [len(made) for made, _ in noted.steps] == [4, 3]
    resumed = Steps()
    run = trainer(tmp_path, callbacks=[resumed], accumulate_grad_batches=4, logger=False)
    run.fit(CausalLMModule(directory, optimizer=adamw(0.0)), data(), ckpt_path=str(tmp_path / "within.ckpt"))
    assert [len(made) for made, _ in resumed.steps] == [2]
    assert_steps_are_those_of_one_batch(directory, [resumed.steps], 1)


def train_on_two_ranks(directory: str, rows: str, cache: str) -> dict[str, list[Step]]:
    """Steps of this rank with several strategies and loaders."""

    def data(**settings: Any) -> InstructionDataModule:
        return InstructionDataModule(directory, rows, batch_size=1, cache_dir=cache, **settings)

    runs = {}
    for strategy in ("ddp", "paca_fsdp2"):
        settings: dict[str, Any] = {"devices": 2, "strategy": strategy}
        runs[f"{strategy}"] = train(directory, data(), **settings, accumulate_grad_batches=1)
        runs[f"{strategy} accumulated"] = train(directory, data(), **settings, accumulate_grad_batches=3)
        packed = data(packing=True, max_length=96)
        runs[f"{strategy} packed"] = train(directory, packed, **settings, accumulate_grad_batches=2)
        rank = torch.distributed.get_rank()
        plain = DataLoader(list(batches(6))[rank::2], batch_size=None)
        settings["use_distributed_sampler"] = False
        runs[f"{strategy} plain loader"] = train(directory, plain, **settings, accumulate_grad_batches=2)
    return runs


@pytest.mark.distributed
def test_steps_of_two_ranks_are_those_of_one_batch(tmp_path: Path) -> None:
    directory = str(tiny_model_directory(tmp_path / "model"))
    rows = rows_of(tmp_path / "rows.jsonl")
    ranks = launch(train_on_two_ranks, 2, directory, rows, str(tmp_path / "cache"))
    for name in ranks[0]:
        of_ranks = [rank[name] for rank in ranks]
        assert any(len(of_ranks[0][0][0]) != len(made) for made, _ in of_ranks[0]) or name in ("ddp", "paca_fsdp2"), (
            name
        )
        assert_steps_are_those_of_one_batch(directory, of_ranks, len(of_ranks[0]))
