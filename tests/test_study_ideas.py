"""Each idea of the study computes what it says: against plain formulas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from paca_lightning import PaCAConfig, PaCAStrategy, apply_paca, attach, paca_layers
from scripts import ideas, study_ideas
from scripts.ideas import ColumnBasis, EigenbasisAdam, WhitenedColumns, input_moments, redraw, whitening
from scripts.study_ideas import IDEAS, gradient_ranks, parse_run, share_ranks
from tests.tools.compare.tasks import debug_task

R, INPUTS, OUTPUTS, ROWS, STEPS = 3, 8, 6, 4, 7


class Data(LightningDataModule):
    """A few batches, always the same."""

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(STEPS * ROWS, INPUTS, generator=generator) * torch.linspace(0.2, 3, INPUTS)
        return DataLoader(TensorDataset(rows, torch.randn(len(rows), OUTPUTS, generator=generator)), ROWS)


class Regression(LightningModule):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, batch: list[Tensor]) -> Tensor:
        return self.linear(batch[0])

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return (self(batch) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def fit(tmp_path: Path, callback: ColumnBasis) -> tuple[Tensor, Tensor]:
    """The weight after training with an idea, and which columns it trained."""
    module = Regression()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[PaCAStrategy(PaCAConfig(r=R)), callback],
    )
    trainer.fit(module, datamodule=Data())
    ((_, layer),) = paca_layers(module)
    return layer.weight.detach().clone(), layer.paca_indices


def plain_training(indices: Tensor, step: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """The weight after a plain loop, in which ``step`` gives the update of the columns from their gradient."""
    weight, bias = Regression().linear.weight.detach().clone(), Regression().linear.bias.detach()
    for number, (rows, wanted) in enumerate(Data().train_dataloader()):
        columns = weight[:, indices].clone().requires_grad_()
        full = weight.index_copy(1, indices, columns)
        (gradient,) = torch.autograd.grad((rows @ full.T + bias - wanted).square().mean(), columns)
        weight[:, indices] += step(number, gradient, rows[:, indices])
    return weight


class Adam:
    """Adam's update, written out."""

    def __init__(self) -> None:
        self.first, self.second, self.steps = torch.zeros(OUTPUTS, R), torch.zeros(OUTPUTS, R), 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        mean, square = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        return -0.05 * mean / (square.sqrt() + 1e-8)


class Fixed(ColumnBasis):
    """A basis that is given."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.bases = {"linear": basis}


def test_a_basis_trains_the_columns_times_it(tmp_path: Path) -> None:
    basis = torch.randn(R, R, generator=torch.Generator().manual_seed(2))
    weight, indices = fit(tmp_path, Fixed(basis))

    # W[:, indices] = C + D P with D as the parameter: autograd gives D's gradient, Adam its step.
    start = Regression().linear
    latent = torch.zeros(OUTPUTS, R, requires_grad=True)
    optimizer = torch.optim.Adam([latent], lr=0.05)
    for rows, wanted in Data().train_dataloader():
        full = start.weight.detach().index_add(1, indices, latent @ basis)
        optimizer.zero_grad()
        (rows @ full.T + start.bias.detach() - wanted).square().mean().backward()
        optimizer.step()
    expected = start.weight.detach().index_add(1, indices, latent.detach() @ basis)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)  # steps add up in another order
    untouched = [column for column in range(INPUTS) if column not in indices]
    assert torch.equal(weight[:, untouched], start.weight.detach()[:, untouched])


def test_whitened_columns_train_in_the_basis_that_the_batches_tell(tmp_path: Path) -> None:
    weight, indices = fit(tmp_path, WhitenedColumns(batches=2))
    seen = torch.cat([rows for rows, _ in Data().train_dataloader()][:2])[:, indices]
    basis, adam = whitening(seen.T @ seen, limit=8), Adam()
    expected = plain_training(indices, lambda _, gradient, __: adam(gradient @ basis.T) @ basis)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)


def test_eigenbasis_adam_is_one_sided_soap(tmp_path: Path) -> None:
    weight, indices = fit(tmp_path, EigenbasisAdam(every=2, decay=0.9))
    adam = Adam()
    moment, vectors = torch.zeros(R, R), torch.eye(R)

    def step(number: int, gradient: Tensor, _: Tensor) -> Tensor:
        nonlocal moment, vectors
        moment = gradient.T @ gradient if number == 0 else 0.9 * moment + 0.1 * gradient.T @ gradient
        if number % 2 == 0:
            turned = torch.linalg.eigh(moment).eigenvectors
            adam.first = adam.first @ vectors.T @ turned
            vectors = turned
        return adam(gradient @ vectors) @ vectors.T

    expected = plain_training(indices, step)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)  # eigenvectors of nearly equal matrices


def test_whitening_gives_equal_moments_in_all_directions() -> None:
    inputs = torch.randn(64, R, generator=torch.Generator().manual_seed(3)) @ torch.tensor(
        [[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.5]]
    )
    moment = inputs.T @ inputs
    basis = whitening(moment, limit=8)
    torch.testing.assert_close(basis.T @ moment @ basis, torch.eye(R) * moment.trace() / R, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        whitening(torch.diag(torch.tensor([1e6, 1.0, 0.0])), limit=8).diag()[1:], torch.tensor([8.0] * 2)
    )


def test_the_moments_are_of_the_trained_columns() -> None:
    module = Regression()
    apply_paca(module, PaCAConfig(r=R))
    ((path, layer),) = paca_layers(module)
    batches = list(Data().train_dataloader())
    found = input_moments(module, batches)
    rows = torch.cat([batch[0] for batch in batches])[:, layer.paca_indices]
    torch.testing.assert_close(found[path], rows.T @ rows)
    assert not layer._forward_pre_hooks


def test_other_columns_are_drawn_and_the_old_ones_stay_trained() -> None:
    module = Regression()
    apply_paca(module, PaCAConfig(r=R))
    ((_, layer),) = paca_layers(module)
    optimizer = module.configure_optimizers()
    attach(optimizer, module)

    def train() -> None:
        for batch in Data().train_dataloader():
            optimizer.zero_grad()
            module.training_step(batch).backward()
            optimizer.step()

    train()
    trained, former = layer.weight.detach().clone(), layer.paca_indices.clone()
    redraw(module, optimizer, seed=0, draw=1)
    assert torch.equal(layer.weight, trained)
    assert not torch.equal(layer.paca_indices, former)
    assert not optimizer.state[layer.paca_delta]
    train()
    changed = (layer.weight != trained).any(0).nonzero().flatten()
    assert torch.equal(changed, layer.paca_indices)


def test_ranks_follow_the_gradients_at_equal_parameters() -> None:
    shapes = {"wide": (64, 256), "narrow": (16, 256), "small": (64, 4)}
    ranks = share_ranks({"wide": 4.0 * 64 * 256, "narrow": 36.0 * 16 * 256, "small": 4.0 * 64 * 4}, shapes, r=8)
    assert ranks["small"] == 4  # it has no more columns
    assert ranks["narrow"] == pytest.approx(3 * ranks["wide"], abs=1)
    trained = sum(rank * shapes[name][0] for name, rank in ranks.items())
    assert 0.9 * 8 * 144 < trained <= 8 * 144


def test_ranks_are_found_on_the_runs_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = debug_task("--model.init_args.dtype=float32")
    config = task.module.model.config

    def from_config(*_: Any, **__: Any) -> nn.Module:
        torch.manual_seed(0)
        return study_ideas.AutoModelForCausalLM.from_config(config)

    monkeypatch.setattr(study_ideas.AutoModelForCausalLM, "from_pretrained", from_config)
    ranks = gradient_ranks(task, tmp_path / "ranks.json")
    assert len(set(ranks.values())) > 1
    method = parse_run("gradient-ranks:1e-2", task, tmp_path)
    assert method.options["rank_pattern"] == ranks
    assert 0.9 < method.count(task) / parse_run("paca:8,lr=1e-2", task, tmp_path).count(task) < 1.03


def test_a_run_is_the_configs_with_the_idea_in_it(tmp_path: Path) -> None:
    task = debug_task()
    for name in IDEAS.keys() - {"gradient-ranks"}:
        method = parse_run(f"{name}:1e-2", task, tmp_path)
        assert method.space == (1e-2, 1e-2)
        first, *own = method.callbacks(task, seed=5)
        assert first["init_args"]["config"]["seed"] == 5
        for entry in own:
            getattr(ideas, entry["class_path"].removeprefix("scripts.ideas."))(**entry["init_args"])
    muon, soap = (
        parse_run(f"{name}:3e-2", task, tmp_path).changed(task.settings, task)["model"]["init_args"]["optimizer"]
        for name in ("muon", "soap")
    )
    assert muon["class_path"] == "torch.optim.Muon"
    assert muon["init_args"] == {"lr": 1e-2, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    assert soap["class_path"] == "pytorch_optimizer.SOAP"
    assert soap["init_args"]["lr"] == 1e-2
