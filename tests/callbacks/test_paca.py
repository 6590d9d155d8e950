"""PaCAStrategy on Lightning's clock: where models are built, how they are trained, saved and resumed."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning import (
    AdapterCheckpoint,
    PaCAConfig,
    PaCAError,
    PaCALinear,
    PaCAStrategy,
    QPaCALinear,
    apply_paca,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
    unload,
)
from paca_lightning.conversion.select import has_own_steps
from tests.artefacts import logged

CONFIG = PaCAConfig(r=4, alpha=8)
DATA = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    """A small network whose weights are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 8))


class Module(pl.LightningModule):
    """Learns to output zeros; built in __init__."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.net(batch).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class BuiltInSetup(Module):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = network()


class BuiltInConfigureModel(Module):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = network()


class TwoOptimizers(Module):
    """Manual optimization: each half of the network has an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = self.net(batch).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        halves = (self.net[0], self.net[2])
        return [torch.optim.SGD([p for p in half.parameters() if p.requires_grad], lr=1e-2) for half in halves]


def loader() -> DataLoader:
    return DataLoader(DATA, batch_size=4)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    """Makes quiet CPU trainers that write to the test's directory."""

    def make(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
            "logger": False,
            "max_epochs": 2,
        }
        return pl.Trainer(callbacks=list(callbacks), **(defaults | arguments))

    return make


def in_step(model: nn.Module) -> bool:
    """Whether every weight equals its base columns plus its scaled delta, as cast."""
    return all(
        torch.equal(
            layer.weight[:, layer.paca_indices],
            (layer.paca_base_columns + layer.factor * layer.paca_delta).to(layer.weight.dtype),
        )
        for _, layer in paca_layers(model)
    )


def moved(model: nn.Module) -> bool:
    """Whether every delta has left zero."""
    return all(bool(layer.paca_delta.any()) for _, layer in paca_layers(model))


def reference_deltas(steps_of: list[list[Tensor]], config: PaCAConfig = CONFIG) -> dict[str, Tensor]:
    """Deltas after plain PyTorch training: a list of micro-batches for each step."""
    net = network()
    apply_paca(nn.ModuleDict({"net": net}), config)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for batches in steps_of:
        for batch in batches:
            (net(batch).square().mean() / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for _, layer in paca_layers(net):
            layer.write_columns()
    return {path: layer.paca_delta.detach() for path, layer in paca_layers(net)}


@pytest.mark.parametrize("module_class", [Module, BuiltInSetup, BuiltInConfigureModel])
def test_model_may_be_built_anywhere(module_class: type[Module], trainer: Any) -> None:
    module = module_class()
    trainer(PaCAStrategy(CONFIG)).fit(module, loader(), loader())
    expected = reference_deltas([[batch] for _ in range(2) for batch in DATA.split(4)])
    for path, layer in paca_layers(module.net):
        assert torch.equal(layer.paca_delta, expected[path])
    assert in_step(module)
    assert "configure_model" not in vars(module)


def test_accumulation_equals_plain_pytorch(trainer: Any) -> None:
    module = Module()
    trainer(PaCAStrategy(CONFIG), accumulate_grad_batches=3).fit(module, loader())
    batches = list(DATA.split(4))
    expected = reference_deltas([batches[:3], batches[3:]] * 2)
    for path, layer in paca_layers(module.net):
        torch.testing.assert_close(layer.paca_delta, expected[path], atol=1e-7, rtol=1e-5)


def test_stages_in_a_row_and_each_alone(trainer: Any) -> None:
    base = trainer().predict(Module(), loader())
    for stage in ("validate", "test", "predict"):
        module = Module()
        result = getattr(trainer(PaCAStrategy(CONFIG)), stage)(module, loader())
        assert isinstance(module.net[0], PaCALinear)
        assert stage != "predict" or torch.equal(torch.cat(result), torch.cat(base))
    module = Module()
    run = trainer(PaCAStrategy(CONFIG))
    run.validate(module, loader(), verbose=False)
    run.fit(module, loader(), loader())
    after = run.validate(module, loader(), verbose=False)
    assert run.test(module, loader(), verbose=False) == after
    trained = run.predict(module, loader())
    assert not torch.equal(torch.cat(trained), torch.cat(base))
    run.fit_loop.max_epochs = 3
    run.fit(module, loader())
    assert in_step(module)


def test_two_optimizers_under_manual_optimization(trainer: Any) -> None:
    module = TwoOptimizers()
    stale = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            stale.append(not in_step(module))

    trainer(PaCAStrategy(CONFIG), Watch()).fit(module, loader())
    assert moved(module)
    assert not any(stale)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision: str, trainer: Any) -> None:
    module = Module()
    trainer(PaCAStrategy(CONFIG), precision=precision, gradient_clip_val=0.5).fit(module, loader())
    first = module.net[0]
    assert first.weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert first.paca_delta.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert moved(module)
    assert in_step(module)


def checkpointed(net: nn.Module) -> None:
    inner = net.forward
    net.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)


def compiled(net: nn.Module) -> None:
    net.compile(fullgraph=True, backend="aot_eager")


IN_PLACE_BEHIND_COMPILED = pytest.mark.xfail(
    torch.__version__.startswith("2.10."),
    raises=RuntimeError,
    reason="torch 2.10 compiles a layer for itself and returns a view, behind which the ReLU may not work in place",
)


@pytest.mark.parametrize("change", [checkpointed, pytest.param(compiled, marks=IN_PLACE_BEHIND_COMPILED)])
def test_activation_checkpointing_and_compile(change: Any, trainer: Any) -> None:
    plain, other = Module(), Module()
    trainer(PaCAStrategy(CONFIG)).fit(plain, loader())
    change(other.net)
    trainer(PaCAStrategy(CONFIG)).fit(other, loader())
    for (_, expected), (_, layer) in zip(paca_layers(plain), paca_layers(other), strict=True):
        torch.testing.assert_close(layer.paca_delta, expected.paca_delta, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("selection", ["weight_norm", "activation_norm", "gradient_norm"])
def test_selection_by_training_data(selection: str, trainer: Any) -> None:
    module = Module()
    scaled = DATA * torch.linspace(0.1, 3, 16)  # the last channels are large, and so are their gradients
    config = PaCAConfig(r=4, selection=selection)
    trainer(PaCAStrategy(config)).fit(module, DataLoader(scaled, batch_size=4))
    indices = module.net[0].paca_indices
    if selection == "weight_norm":
        assert torch.equal(indices, network()[0].weight.norm(dim=0).topk(4).indices.sort().values)
    else:
        assert int(indices.min()) >= 8
    assert in_step(module)
    assert moved(module)


def test_summary_names_the_effective_step(trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    callback = PaCAStrategy(CONFIG)
    trainer(callback).fit(Module(), loader())
    printed = capsys.readouterr().out
    assert "scaling * lr: 0.02" in printed
    assert "160 of 968" in printed
    assert callback.report is not None
    assert callback.report.delta_bytes == 160 * 4


def test_logs_the_effective_step(trainer: Any, tmp_path: Path) -> None:
    run = trainer(PaCAStrategy(CONFIG), logger=CSVLogger(tmp_path), log_every_n_steps=2)
    run.fit(Module(), loader())
    assert logged(Path(run.log_dir), "paca/scaled_lr") == [0.02] * 6  # scaling 2, learning rate 0.01; 12 steps


# Checkpoints


def test_checkpoint_holds_the_adapter_alone(trainer: Any, tmp_path: Path) -> None:
    for weights_only in (False, True):
        saving = ModelCheckpoint(tmp_path / f"{weights_only}", filename="last", save_weights_only=weights_only)
        trainer(PaCAStrategy(CONFIG), saving).fit(Module(), loader())
        state = torch.load(tmp_path / f"{weights_only}" / "last.ckpt", weights_only=True)["state_dict"]
        assert {key.rpartition(".")[2] for key in state} == {"paca_delta", "paca_indices"}
        assert len(state) == 4


def test_full_checkpoints_keep_the_base(trainer: Any, tmp_path: Path) -> None:
    module = Module()
    saving = ModelCheckpoint(tmp_path, filename="full")
    trainer(PaCAStrategy(CONFIG, full_checkpoints=True), saving).fit(module, loader())
    state = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["net.0.weight"], module.net[0].weight)
    fresh = Module()
    trainer(PaCAStrategy(CONFIG, full_checkpoints=True)).validate(
        fresh, loader(), ckpt_path=tmp_path / "full.ckpt", verbose=False
    )
    assert torch.equal(fresh.net[0].weight, module.net[0].weight)


def test_a_later_run_may_keep_the_base(trainer: Any, tmp_path: Path) -> None:
    module = Module()
    trainer(PaCAStrategy(CONFIG)).fit(module, loader())
    later = PaCAStrategy(CONFIG, full_checkpoints=True)
    trainer(later, ModelCheckpoint(tmp_path, filename="full"), max_epochs=3).fit(module, loader())
    assert "net.0.weight" in torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("back", [merge, unload])
def test_an_ordinary_model_again_is_saved_whole(trainer: Any, back: Any) -> None:
    module = Module()
    trainer(PaCAStrategy(CONFIG)).fit(module, loader())
    assert "net.0.weight" not in module.state_dict()
    back(module)
    assert module.state_dict().keys() == Module().state_dict().keys()


def test_resume_is_bitwise_the_uninterrupted_run(trainer: Any, tmp_path: Path) -> None:
    whole, first, second = Module(), Module(), Module()
    trainer(PaCAStrategy(CONFIG), max_epochs=4).fit(whole, loader())
    trainer(PaCAStrategy(CONFIG), ModelCheckpoint(tmp_path, filename="half"), max_epochs=2).fit(first, loader())
    trainer(PaCAStrategy(CONFIG), max_epochs=4).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    for (_, expected), (_, layer) in zip(paca_layers(whole), paca_layers(second), strict=True):
        assert torch.equal(layer.paca_delta, expected.paca_delta)
        assert torch.equal(layer.weight, expected.weight)


def test_resume_takes_the_columns_of_the_checkpoint(trainer: Any, tmp_path: Path) -> None:
    first, other = Module(), Module()
    trainer(PaCAStrategy(CONFIG), ModelCheckpoint(tmp_path, filename="one")).fit(first, loader())
    another_draw = PaCAConfig(r=4, alpha=8, seed=7)
    trainer(PaCAStrategy(another_draw)).validate(other, loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert torch.equal(other.net[0].paca_indices, first.net[0].paca_indices)
    assert torch.equal(other.net[0].weight, first.net[0].weight)


class OnAnotherBase(Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.net[0].weight.mul_(1.1)


def test_checkpoint_of_another_base_model_is_refused(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    trainer(PaCAStrategy(CONFIG), ModelCheckpoint(tmp_path, filename="one")).fit(Module(), loader())
    trainer(PaCAStrategy(CONFIG)).test(Module(), loader(), ckpt_path=path, verbose=False)
    for stage in ("validate", "test", "predict"):
        with pytest.raises(PaCAError, match=r"another base model: .* most in 'net\.0'"):
            getattr(trainer(PaCAStrategy(CONFIG)), stage)(OnAnotherBase(), loader(), ckpt_path=path)
    with pytest.raises(PaCAError, match="another base model"):
        trainer(PaCAStrategy(CONFIG), max_epochs=4).fit(OnAnotherBase(), loader(), ckpt_path=path)


def test_an_adapter_checkpoint_without_an_adapter_is_refused_before_training(trainer: Any, tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(PaCAError, match="nothing to write: no layer is trained by PaCA"):
        trainer(AdapterCheckpoint(str(tmp_path / "adapter"))).fit(module, loader())
    assert torch.equal(module.net[0].weight, network()[0].weight)


def test_checkpoint_of_another_conversion_is_refused(trainer: Any, tmp_path: Path) -> None:
    trainer(PaCAStrategy(CONFIG), ModelCheckpoint(tmp_path, filename="one")).fit(Module(), loader())
    for config, message in (
        (PaCAConfig(r=5), r"'net.0' has shape \(32, 4\) in the checkpoint"),
        (PaCAConfig(r=4, target_modules=["0"]), "not a PaCA layer"),
    ):
        with pytest.raises(PaCAError, match=message):
            trainer(PaCAStrategy(config)).validate(Module(), loader(), ckpt_path=tmp_path / "one.ckpt")
    partial = PaCAConfig(r=4, target_modules=["0"])
    trainer(PaCAStrategy(partial), ModelCheckpoint(tmp_path, filename="partial")).fit(Module(), loader())
    with pytest.raises(PaCAError, match=r"nothing for the PaCA layer .net\.2."):
        trainer(PaCAStrategy(CONFIG)).validate(Module(), loader(), ckpt_path=tmp_path / "partial.ckpt")


def test_checkpoint_of_another_scaling_is_refused(trainer: Any, tmp_path: Path) -> None:
    trainer(PaCAStrategy(CONFIG), ModelCheckpoint(tmp_path, filename="one")).fit(Module(), loader())
    for stage in ("fit", "validate"):
        run = trainer(PaCAStrategy(PaCAConfig(r=4, alpha=4)), max_epochs=3)
        with pytest.raises(PaCAError, match=r"'net\.0' with scaling 2 .*this run has 1"):
            getattr(run, stage)(Module(), loader(), ckpt_path=tmp_path / "one.ckpt")


def test_adapter_goes_in_and_out(trainer: Any, tmp_path: Path) -> None:
    module = Module()
    trainer(PaCAStrategy(CONFIG), AdapterCheckpoint(str(tmp_path / "adapter"))).fit(module, loader())
    fresh = Module()
    result = trainer(PaCAStrategy(adapter=str(tmp_path / "adapter"))).predict(fresh, loader())
    assert torch.equal(torch.cat(result), torch.cat(trainer().predict(module, loader())))
    plain = Module()
    load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain.net[0].weight, module.net[0].weight)
    continued = Module()
    trainer(PaCAStrategy(adapter=str(tmp_path / "adapter"))).fit(continued, loader())
    assert in_step(continued)
    assert not torch.equal(continued.net[0].weight, module.net[0].weight)


def test_training_goes_on_from_an_adapter_and_is_evaluated_as_trained(trainer: Any, tmp_path: Path) -> None:
    trainer(PaCAStrategy(CONFIG), AdapterCheckpoint(str(tmp_path / "adapter"))).fit(Module(), loader())
    module = Module()
    run = trainer(PaCAStrategy(adapter=str(tmp_path / "adapter")))
    run.fit(module, loader(), loader())
    trained = module.net[0].paca_delta.detach().clone()
    run.validate(module, loader(), verbose=False)
    assert torch.equal(module.net[0].paca_delta, trained)


@pytest.mark.parametrize("selection", ["activation_norm", "quant_error", "output_error"])
def test_adapter_of_a_quantized_base_with_columns_chosen_by_data(selection: str, trainer: Any, tmp_path: Path) -> None:
    module = Module()
    config = PaCAConfig(r=4, quantize="nf4", selection=selection)
    trainer(PaCAStrategy(config), AdapterCheckpoint(str(tmp_path / "adapter"))).fit(module, loader())
    expected = torch.cat(trainer().predict(module, loader()))
    fresh = Module()
    result = trainer(PaCAStrategy(adapter=str(tmp_path / "adapter"))).predict(fresh, loader())
    torch.testing.assert_close(torch.cat(result), expected)


def test_ctrl_c_leaves_the_adapter(trainer: Any, tmp_path: Path) -> None:
    class Impatient(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    module = Module()
    with pytest.raises(SystemExit):
        trainer(PaCAStrategy(CONFIG), AdapterCheckpoint(str(tmp_path / "adapter")), Impatient()).fit(module, loader())
    fresh = Module()
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.net[0].weight, module.net[0].weight)


@pytest.mark.parametrize("selection", ["activation_norm", "output_error"])
def test_quantized_base_with_columns_chosen_by_data_resumes(selection: str, trainer: Any, tmp_path: Path) -> None:
    config = PaCAConfig(r=4, quantize="nf4", selection=selection)
    whole, first, second = Module(), Module(), Module()
    trainer(PaCAStrategy(config), max_epochs=2).fit(whole, loader())
    trainer(PaCAStrategy(config), ModelCheckpoint(tmp_path, filename="one"), max_epochs=1).fit(first, loader())
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert {key.rpartition(".")[2] for key in state} == {"paca_delta", "paca_indices", "paca_scale"}
    trainer(PaCAStrategy(config), max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "one.ckpt")
    for (_, expected), (_, layer) in zip(paca_layers(whole), paca_layers(second), strict=True):
        assert isinstance(layer, QPaCALinear)
        assert torch.equal(layer.paca_delta, expected.paca_delta)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_run_whose_columns_have_steps_of_their_own_resumes_bitwise(
    quantize: str | None, trainer: Any, tmp_path: Path
) -> None:
    config = PaCAConfig(r=4, column_steps="input_rms", quantize=quantize)
    scaled = DataLoader(DATA * torch.linspace(0.1, 3, 16), batch_size=4)
    whole, first, second = Module(), Module(), Module()
    trainer(PaCAStrategy(config), max_epochs=2).fit(whole, scaled)
    trainer(PaCAStrategy(config), ModelCheckpoint(tmp_path, filename="one"), max_epochs=1).fit(first, scaled)
    trainer(PaCAStrategy(config), max_epochs=2).fit(second, scaled, ckpt_path=tmp_path / "one.ckpt")
    assert any(has_own_steps(layer) for _, layer in paca_layers(whole))
    for (_, expected), (_, layer) in zip(paca_layers(whole), paca_layers(second), strict=True):
        assert torch.equal(layer.paca_scale, expected.paca_scale)
        assert torch.equal(layer.paca_delta, expected.paca_delta)
        assert torch.equal(layer.weight, expected.weight)


def test_evaluation_quantizes_with_the_columns_of_the_checkpoint(trainer: Any, tmp_path: Path) -> None:
    config = PaCAConfig(r=4, quantize="nf4", selection="activation_norm")
    trained, fresh = Module(), Module()
    trainer(PaCAStrategy(config), ModelCheckpoint(tmp_path, filename="one")).fit(trained, loader())
    run = trainer(PaCAStrategy(config))
    result = run.predict(fresh, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert isinstance(fresh.net[0], QPaCALinear)
    torch.testing.assert_close(torch.cat(result), torch.cat(trainer().predict(trained, loader())))


def test_checkpoint_without_a_module_that_is_trained_whole(trainer: Any, tmp_path: Path) -> None:
    partial = PaCAConfig(r=4, target_modules=["0"])
    trainer(PaCAStrategy(partial), ModelCheckpoint(tmp_path, filename="one")).fit(Module(), loader())
    both = PaCAConfig(r=4, target_modules=["0"], modules_to_save=["2"])
    with pytest.raises(PaCAError, match=r"nothing for 'net\.2\.weight', which this run trains whole"):
        trainer(PaCAStrategy(both)).validate(Module(), loader(), ckpt_path=tmp_path / "one.ckpt")


# Weight averaging


def test_averaging_packed_weights_is_refused(trainer: Any) -> None:
    with pytest.raises(PaCAError, match="packed NF4 weights"):
        trainer(PaCAStrategy(PaCAConfig(r=4, quantize="nf4")), EMAWeightAveraging()).fit(Module(), loader())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_averaged_weights_stay_in_step(precision: str, trainer: Any) -> None:
    module = Module()
    seen: list[bool] = []

    class Watch(pl.Callback):
        def on_validation_batch_start(self, *_: Any) -> None:
            seen.append(in_step(module))

    before = PaCAStrategy(CONFIG)
    run = trainer(before, EMAWeightAveraging(decay=0.9), Watch(), precision=precision)
    run.fit(module, loader(), loader())
    assert all(seen)
    assert len(seen) > 6
    assert in_step(module)
    fresh = Module()
    apply_paca(fresh, CONFIG)
    assert torch.equal(module.net[0].paca_indices, fresh.net[0].paca_indices)
    plain = Module()
    trainer(PaCAStrategy(CONFIG), precision=precision).fit(plain, loader())
    assert not torch.equal(plain.net[0].paca_delta, module.net[0].paca_delta)


def test_averaged_run_resumes(trainer: Any, tmp_path: Path) -> None:
    def average() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.9)

    whole, first, second = Module(), Module(), Module()
    trainer(PaCAStrategy(CONFIG), average(), max_epochs=4).fit(whole, loader())
    saving = ModelCheckpoint(tmp_path, filename="half")
    trainer(PaCAStrategy(CONFIG), average(), saving, max_epochs=2).fit(first, loader())
    trainer(PaCAStrategy(CONFIG), average(), max_epochs=4).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    for (_, expected), (_, layer) in zip(paca_layers(whole), paca_layers(second), strict=True):
        assert torch.equal(layer.paca_delta, expected.paca_delta)


def test_stochastic_weight_averaging(trainer: Any) -> None:
    module = Module()
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    trainer(PaCAStrategy(CONFIG), averaging, max_epochs=4).fit(module, loader(), loader())
    assert in_step(module)
    assert moved(module)

    class Epochs(pl.Callback):
        deltas: ClassVar[list[Tensor]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.deltas.append(pl_module.net[0].paca_delta.detach().clone())

    watched = Epochs()
    same = Module()
    again = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    trainer(PaCAStrategy(CONFIG), again, watched, max_epochs=4).fit(same, loader(), loader())
    averaged = sum(watched.deltas[:3]) / 4  # it looks at the starts of all four epochs, the first of which has zeros
    assert torch.allclose(same.net[0].paca_delta, averaged, rtol=1e-5, atol=1e-7)


def test_averaging_listed_first_is_refused(trainer: Any) -> None:
    with pytest.raises(PaCAError, match="EMAWeightAveraging is listed before PaCAStrategy"):
        trainer(EMAWeightAveraging(), PaCAStrategy(CONFIG)).fit(Module(), loader())


# Mistakes, found before training


def test_strategy_of_that_name_is_explained() -> None:
    with pytest.raises(PaCAError, match=r"callbacks=\[PaCAStrategy\(\)\]"):
        pl.Trainer(accelerator="cpu", strategy="PaCAStrategy")


def test_optimizer_without_the_deltas(trainer: Any) -> None:
    class TooEarly(Module):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

    with pytest.raises(PaCAError, match=r"2 of 2 PaCA layers are in no optimizer.*OptimizerCallable"):
        trainer(PaCAStrategy(CONFIG)).fit(TooEarly(), loader())


def test_converted_before_with_another_config(trainer: Any) -> None:
    module = Module()
    apply_paca(module, CONFIG)
    with pytest.raises(PaCAError, match="converted before with another configuration"):
        trainer(PaCAStrategy(PaCAConfig(r=2))).fit(module, loader())
    trainer(PaCAStrategy(CONFIG)).fit(module, loader())
    assert moved(module)


def test_directory_that_cannot_be_written(trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    blocked = str(tmp_path / "file" / "inside")
    for arguments, callbacks in (
        ({"default_root_dir": blocked, "logger": CSVLogger(tmp_path)}, []),
        ({}, [ModelCheckpoint(blocked)]),
        ({}, [AdapterCheckpoint(blocked)]),
    ):
        module = Module()
        with pytest.raises(PaCAError, match="cannot be written"):
            trainer(PaCAStrategy(CONFIG), *callbacks, **arguments).fit(module, loader())
        for layer in (0, 2):
            assert torch.equal(module.net[layer].weight, network()[layer].weight)
    trainer(PaCAStrategy(CONFIG), default_root_dir=blocked).fit(Module(), loader())  # which writes nothing


class Replaces(MixedPrecision):
    """A precision that, like some libraries', puts layers of its own in place of the linear ones."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")

    def convert_module(self, module: nn.Module) -> nn.Module:
        for index in (0, 2):
            module.net[index] = nn.Linear(module.net[index].in_features, module.net[index].out_features)  # type: ignore
        return module


def test_layers_that_were_replaced_after_their_conversion(trainer: Any) -> None:
    with pytest.raises(PaCAError, match="The converted layers are gone"):
        trainer(PaCAStrategy(CONFIG), plugins=[Replaces()]).fit(Module(), loader())


def test_the_learning_rate_that_is_told_is_that_of_the_deltas(trainer: Any, tmp_path: Path) -> None:
    class NewHead(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            head = {"params": list(self.net[2].parameters()), "lr": 0.5}
            return torch.optim.AdamW([{"params": [self.net[0].paca_delta], "lr": 1e-3}, head])

    paca = PaCAStrategy(PaCAConfig(r=4, alpha=8, modules_to_save=["2"]))
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(paca, logger=logger, log_every_n_steps=1).fit(NewHead(), loader())
    assert paca.report is not None
    assert paca.report.learning_rate == 1e-3
    assert set(logged(tmp_path, "paca/scaled_lr")) == {2 * 1e-3}


def test_a_method_that_the_module_had_of_its_own_is_put_back(trainer: Any) -> None:
    module = Module()
    module.configure_model = lambda: None  # type: ignore[method-assign]
    before = module.configure_model
    trainer(PaCAStrategy(CONFIG)).fit(module, loader())
    assert module.configure_model is before
    assert "on_load_checkpoint" not in vars(module)


def test_calibration_with_manual_optimization_is_refused(trainer: Any) -> None:
    with pytest.raises(PaCAError, match="manual optimization"):
        trainer(PaCAStrategy(PaCAConfig(r=4, selection="activation_norm"))).fit(TwoOptimizers(), loader())


def test_calibration_with_several_train_loaders_is_refused(trainer: Any) -> None:
    with pytest.raises(PaCAError, match="this run has several"):
        trainer(PaCAStrategy(PaCAConfig(r=4, selection="activation_norm"))).fit(
            Module(), {"a": loader(), "b": loader()}
        )


def test_adapter_of_another_model_is_refused(trainer: Any, tmp_path: Path) -> None:
    module = Module()
    apply_paca(module, CONFIG)
    save_adapter(module, tmp_path / "adapter")
    other = Module()
    nn.init.normal_(other.net[0].weight)
    with pytest.raises(PaCAError, match="another base model"):
        trainer(PaCAStrategy(adapter=str(tmp_path / "adapter"))).fit(other, loader())


def test_a_config_that_contradicts_its_adapter_is_refused(trainer: Any, tmp_path: Path) -> None:
    adapter = str(tmp_path / "adapter")
    trainer(PaCAStrategy(PaCAConfig(r=8)), AdapterCheckpoint(adapter)).fit(Module(), loader())
    assert PaCAStrategy(adapter=adapter).config == PaCAConfig(r=8)
    assert PaCAStrategy(PaCAConfig(r=8, seed=5), adapter=adapter).config.seed == 5  # the columns are the adapter's
    with pytest.raises(
        PaCAError, match=r"config says r=16, and the adapter '.*' was trained with r=8\. Leave config out"
    ):
        PaCAStrategy(PaCAConfig(r=16), adapter=adapter)  # the default rank, but given
    with pytest.raises(PaCAError, match=r"target_modules=\['0'\]"):
        PaCAStrategy(PaCAConfig(r=8, target_modules=["0"]), adapter=adapter)


def test_a_module_is_copied_and_pickled_within_a_run(trainer: Any) -> None:
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            self.copy = copy.deepcopy(module)
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            self.pickled = torch.load(file, weights_only=False)
            self.weight = module.net[0].weight.detach().clone()

    module, copies = BuiltInConfigureModel(), Copies()
    trainer(PaCAStrategy(CONFIG), copies, max_steps=2).fit(module, loader())
    for other in (copies.copy, copies.pickled):
        assert torch.equal(other.net[0].weight, copies.weight)
        other.configure_model()  # its own, without the run's conversion
        assert other.net is not module.net
        trainer(PaCAStrategy(CONFIG)).fit(other, loader())
        assert moved(other)
        assert in_step(other)


def test_checkpoints_are_as_strict_as_before_but_for_frozen_weights(trainer: Any, tmp_path: Path) -> None:
    trainer(PaCAStrategy(CONFIG), ModelCheckpoint(tmp_path, filename="one")).fit(Module(), loader())
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.9.weight"] = torch.zeros(2)
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "net\.9\.weight"'):
        trainer(PaCAStrategy(CONFIG)).validate(Module(), loader(), ckpt_path=tmp_path / "foreign.ckpt")
    module = Module()
    trainer(PaCAStrategy(CONFIG)).validate(module, loader(), verbose=False)
    assert module.strict_loading


def test_a_checkpoint_without_paca_is_not_resumed(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    trainer(ModelCheckpoint(tmp_path, filename="plain")).fit(Module(), loader())
    with pytest.raises(PaCAError, match="The checkpoint was written without PaCA"):
        trainer(PaCAStrategy(CONFIG), max_epochs=4).fit(Module(), loader(), ckpt_path=path)
    trainer(PaCAStrategy(CONFIG)).validate(Module(), loader(), ckpt_path=path, verbose=False)  # its weights, evaluated
