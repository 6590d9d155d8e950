"""Columns chosen by a run's own training data: the run after it is the one it would have been anyway."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, QPaCALinear, apply_paca, paca_layers
from paca_lightning.conversion.scores import calibrate
from paca_lightning.conversion.select import has_own_steps
from tests.callbacks.test_paca import DATA, Module, loader, trainer  # noqa: F401  (a fixture)
from tests.distributed_launch import launch

BY_ACTIVATION = PaCAConfig(r=4, alpha=8, selection="activation_norm")
# Some channels are large, which a random draw does not know.
LOUD = DATA * torch.linspace(0.1, 3.0, 16)


def loud() -> DataLoader:
    return DataLoader(LOUD, batch_size=4)  # type: ignore[arg-type]


def columns(model: nn.Module) -> list[list[int]]:
    return [layer.paca_indices.tolist() for _, layer in paca_layers(model)]


@pytest.fixture
def chosen(trainer: Any) -> list[list[int]]:  # noqa: F811
    """The columns that the data favours."""
    module = Module()
    trainer(PaCAStrategy(BY_ACTIVATION)).fit(module, loud())
    return columns(module)


def test_a_learning_rate_finder_beside_changes_nothing(trainer: Any, chosen: list[list[int]]) -> None:  # noqa: F811
    class WithRate(Module):
        lr = 1e-2

    module = WithRate()
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    trainer(PaCAStrategy(BY_ACTIVATION), finder).fit(module, loud())
    assert columns(module) == chosen
    assert chosen[0] == [12, 13, 14, 15]


def test_the_step_is_called_as_lightning_calls_it(trainer: Any, chosen: list[list[int]]) -> None:  # noqa: F811
    class WithoutNumber(Module):
        def training_step(self, batch: Tensor) -> Tensor:
            return self.net(batch).square().mean()

    module = WithoutNumber()
    trainer(PaCAStrategy(BY_ACTIVATION), precision="bf16-true").fit(module, loud())  # floats come in fp32
    assert columns(module)[0] == chosen[0]


def test_loaders_and_metrics_are_as_before(trainer: Any) -> None:  # noqa: F811
    class Counting(Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()
            self.seen: list[Tensor] = []

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.mean.update(batch)
            self.seen.append(batch)
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if self.global_step == 0:
                assert self.mean.update_count == 0
                self.seen.clear()

    def shuffled() -> DataLoader:
        return DataLoader(DATA, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))  # type: ignore[arg-type]

    with_data, at_random = Counting(), Counting()
    trainer(PaCAStrategy(BY_ACTIVATION), max_epochs=1).fit(with_data, shuffled())
    trainer(PaCAStrategy(PaCAConfig(r=4)), max_epochs=1).fit(at_random, shuffled())
    assert all(torch.equal(a, b) for a, b in zip(with_data.seen, at_random.seen, strict=True))


def test_resume_in_narrow_precision_is_bitwise(trainer: Any, tmp_path: Any) -> None:  # noqa: F811
    """The columns are chosen from weights that were cast, and restored into weights that were not yet."""

    def run(epochs: int, *more: Any, ckpt_path: Any = None) -> Module:
        module = Module()
        trainer(PaCAStrategy(BY_ACTIVATION), *more, max_epochs=epochs, precision="bf16-true").fit(
            module, loud(), ckpt_path=ckpt_path
        )
        return module

    whole = run(3)
    run(1, ModelCheckpoint(tmp_path, filename="one"))
    resumed = run(3, ckpt_path=tmp_path / "one.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert all(
        torch.equal(ours.weight, theirs.weight)
        for (_, ours), (_, theirs) in zip(paca_layers(whole), paca_layers(resumed), strict=True)
    )


def test_an_average_that_has_not_begun_is_the_base_model(trainer: Any) -> None:  # noqa: F811
    class Losses(Module):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.losses.append(float(self.net(batch).square().mean()))

    module = Losses()
    late = EMAWeightAveraging(decay=0.9, update_starting_at_step=1000)
    trainer(PaCAStrategy(BY_ACTIVATION), late, max_epochs=1, limit_val_batches=1).fit(module, loud(), loud())
    sanity, after = module.losses
    assert after == sanity


def test_a_quantized_model_is_trained_after_an_evaluation(trainer: Any, tmp_path: Any) -> None:  # noqa: F811
    config = PaCAConfig(r=4, alpha=8, selection="activation_norm", quantize="nf4")
    first = Module()
    trainer(PaCAStrategy(config), ModelCheckpoint(tmp_path, filename="one")).fit(first, loud())
    with pytest.raises(PaCAError, match=r"nothing to evaluate yet\. Give a checkpoint or an adapter"):
        trainer(PaCAStrategy(config)).validate(Module(), loud(), verbose=False)

    module = Module()
    run = trainer(PaCAStrategy(config), max_epochs=4)
    run.validate(module, loud(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert all(isinstance(layer, QPaCALinear) for _, layer in paca_layers(module))
    assert columns(module) == columns(first)
    run.fit(module, loud())


def test_a_run_weighs_the_errors_of_quantization_by_its_first_batches(trainer: Any) -> None:  # noqa: F811
    config = PaCAConfig(r=4, alpha=8, quantize="nf4", selection="output_error")
    module, given, by_weight = Module(), Module().net, Module().net
    trainer(PaCAStrategy(config)).fit(module, loud())
    apply_paca(given, config, calibration=loud())
    apply_paca(by_weight, replace(config, selection="quant_error"))
    assert all(isinstance(layer, QPaCALinear) for _, layer in paca_layers(module))
    assert has_own_steps(module.net[0])
    assert columns(module) == columns(given) != columns(by_weight)


def test_the_summary_says_that_data_choose_the_columns_unless_a_checkpoint_did(
    trainer: Any,  # noqa: F811
    tmp_path: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = PaCAConfig(r=4, alpha=8, quantize="nf4", selection="output_error")
    trainer(PaCAStrategy(config), ModelCheckpoint(tmp_path, filename="one")).fit(Module(), loud())
    assert "Columns: output_error chooses those of 2 layers by data" in capsys.readouterr().out
    trainer(PaCAStrategy(config), max_epochs=3).fit(Module(), loud(), ckpt_path=tmp_path / "one.ckpt")
    assert "Columns: " not in capsys.readouterr().out


def test_columns_of_a_checkpoint_stay_when_training_follows_an_evaluation(trainer: Any, tmp_path: Any) -> None:  # noqa: F811
    trainer(PaCAStrategy(BY_ACTIVATION), ModelCheckpoint(tmp_path, filename="one")).fit(Module(), loud())
    module = Module()
    run = trainer(PaCAStrategy(BY_ACTIVATION), max_epochs=1)
    run.validate(module, loud(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    restored = columns(module)
    run.fit(module, DataLoader(LOUD.flip(1), batch_size=4))  # type: ignore[arg-type]  # favours the first channels
    assert columns(module) == restored


def test_resume_is_bitwise_where_the_choice_leaves_no_choice(trainer: Any, tmp_path: Any) -> None:  # noqa: F811
    """All columns are trained: those that the layer began with, in fp32."""

    def run(epochs: int, *more: Any, ckpt_path: Any = None) -> Module:
        module = Module()
        paca = PaCAStrategy(PaCAConfig(r=16, target_modules=["0"], selection="activation_norm"))
        trainer(paca, *more, max_epochs=epochs, precision="bf16-true").fit(module, loud(), ckpt_path=ckpt_path)
        return module

    whole = run(2)
    run(1, ModelCheckpoint(tmp_path, filename="one"))
    resumed = run(2, ckpt_path=tmp_path / "one.ckpt")
    assert torch.equal(whole.net[0].paca_base_columns, resumed.net[0].paca_base_columns)
    assert torch.equal(whole.net[0].weight, resumed.net[0].weight)


class Gradients(Module):
    """Notes the gradients of the first step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == 0:
            whole = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in self.parameters()]
            self.first = [grad.clone() for grad in whole if grad is not None]


def first_gradients(strategy: str) -> tuple[list[list[int]], list[Tensor]]:
    module: LightningModule = Gradients()
    Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        callbacks=[PaCAStrategy(PaCAConfig(r=4, selection="gradient_norm"))],
        max_steps=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader())
    return columns(module), module.first  # type: ignore[return-value]


@pytest.mark.distributed
def test_gradients_of_the_choice_stay_out_of_the_first_sharded_step() -> None:
    (indices, plain), (sharded_indices, sharded) = (
        launch(first_gradients, 1, strategy)[0] for strategy in ("auto", "paca_fsdp2")
    )
    assert sharded_indices == indices
    assert all(torch.equal(a, b) for a, b in zip(plain, sharded, strict=True))


def test_a_later_callback_chooses_what_an_earlier_one_left_open(trainer: Any, chosen: list[list[int]]) -> None:  # noqa: F811
    module = Module()
    trainer(PaCAStrategy(BY_ACTIVATION)).validate(module, loud(), verbose=False)
    assert columns(module) != chosen
    trainer(PaCAStrategy(BY_ACTIVATION)).fit(module, loud())
    assert columns(module) == chosen


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("use", ["lr_find", "scale_batch_size"])
@pytest.mark.parametrize("same_callback", [True, False])
def test_a_tuner_leaves_the_choice_as_it_is(
    same_callback: bool,
    use: str,
    quantize: str | None,
    trainer: Any,  # noqa: F811
) -> None:
    class Tunable(Module):
        lr = 1e-2
        batch_size = 4

        def train_dataloader(self) -> DataLoader:
            return DataLoader(LOUD, batch_size=self.batch_size)  # type: ignore[arg-type]

        val_dataloader = train_dataloader

    config = PaCAConfig(r=4, alpha=8, selection="activation_norm", quantize=quantize)
    plain, tuned = Tunable(), Tunable()
    trainer(PaCAStrategy(config)).fit(plain)
    callback = PaCAStrategy(config)
    run = trainer(callback)
    if use == "lr_find":
        Tuner(run).lr_find(tuned, num_training=5, update_attr=False)
    else:
        Tuner(run).scale_batch_size(tuned, steps_per_trial=1, max_trials=2)
        tuned.batch_size = 4
    assert not any(bool(layer.paca_delta.any()) for _, layer in paca_layers(tuned))
    trainer(callback if same_callback else PaCAStrategy(config)).fit(tuned)
    assert columns(tuned) == columns(plain)
    for (_, layer), (_, expected) in zip(paca_layers(tuned), paca_layers(plain), strict=True):
        assert torch.equal(layer.paca_delta, expected.paca_delta)


def test_scores_are_where_the_layer_computes() -> None:
    """An offloaded delta lies in host memory while its layer computes elsewhere: here on meta."""

    class Offloaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:
            for hook in self.linear._forward_hooks.values():
                hook(self.linear, (input,), {}, input)
            return input

    model = Offloaded()
    apply_paca(model, PaCAConfig(r=2))
    layers, batches = dict(paca_layers(model)), [torch.ones(3, 4, device="meta")]
    scores = calibrate(model, layers, "activation_norm", batches, step=model)
    assert scores["linear"].is_meta
    assert model.linear.paca_delta.device.type == "cpu"
