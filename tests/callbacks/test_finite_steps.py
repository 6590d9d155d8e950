"""NaN and Inf in a loss or a gradient: the run stops or skips the step, and what is on the disk stays good."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from paca_lightning import AdapterCheckpoint, PaCAError, PaCAStrategy, paca_layers
from paca_lightning.callbacks import finite_steps
from paca_lightning.callbacks.finite_steps import FiniteSteps
from tests.callbacks.test_paca import CONFIG, Module, TwoOptimizers, loader

STEP, STEPS = 3, 5  # the one that goes wrong, counted from 0, and all


class Poisoned(Module):
    """A loss or a gradient that is not finite in some steps."""

    def __init__(self, where: str, value: float, steps: Any = (STEP,)) -> None:
        super().__init__()
        self.where, self.value, self.steps = where, value, steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step not in self.steps:
            return super().training_step(batch, batch_idx)
        hidden = self.net[1](self.net[0](batch))
        if self.where == "gradient":
            hidden.register_hook(lambda gradient: gradient * self.value)
        loss = self.net[2](hidden).square().mean()
        return {"loss": loss + self.value, "loss and gradient": loss * self.value, "gradient": loss}[self.where]


def trainer(directory: Path, *callbacks: Any, nonfinite: Any = "stop", **settings: Any) -> L.Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = (PaCAStrategy(CONFIG, nonfinite=nonfinite), *callbacks)
    return L.Trainer(default_root_dir=directory, callbacks=list(callbacks), **arguments | settings)


def deltas(module: L.LightningModule) -> list[Tensor]:
    return [layer.paca_delta.detach().clone() for _, layer in paca_layers(module)]


def trained(steps: int, directory: Path) -> list[Tensor]:
    module = Module()
    trainer(directory, max_steps=steps, enable_checkpointing=False).fit(module, loader())
    return deltas(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("loss", "Optimizer step 4: the loss is NaN or Inf. The step was not taken"),
        ("loss and gradient", "the loss is NaN or Inf and 2 of 2 gradients have NaN or Inf, in the backward 'net.2.pa"),
        ("gradient", "Optimizer step 4: 1 of 2 gradients have NaN or Inf, in the backward 'net.0.paca_delta' first."),
    ],
)
def test_a_bad_step_stops_the_run_before_it_is_taken(where: str, value: float, complaint: str, tmp_path: Path) -> None:
    module = Poisoned(where, value)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    with pytest.raises(PaCAError, match=complaint):
        trainer(tmp_path, saving, AdapterCheckpoint(), gradient_clip_val=1.0).fit(module, loader())
    expected = trained(STEP, tmp_path)
    assert all(map(torch.equal, deltas(module), expected))
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == STEP
    assert torch.equal(last["state_dict"]["net.0.paca_delta"], expected[0])
    assert (tmp_path / "adapter-interrupted").exists()


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_is_skipped_as_if_it_had_not_been(where: str, tmp_path: Path) -> None:
    class WithoutTheStep(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx != STEP else None

    module = Poisoned(where, float("nan"))
    with pytest.warns(UserWarning, match=r"Optimizer step 4: .* The step is skipped \(nonfinite='skip'\)"):
        trainer(tmp_path, nonfinite="skip", max_epochs=1, max_steps=-1, enable_checkpointing=False).fit(
            module, loader()
        )
    plain = WithoutTheStep()
    trainer(tmp_path, max_epochs=1, max_steps=-1, enable_checkpointing=False).fit(plain, loader())
    assert all(map(torch.equal, deltas(module), deltas(plain)))


def test_steps_are_not_skipped_for_ever(tmp_path: Path) -> None:
    module = Poisoned("loss", float("nan"), range(1, 100))
    with (
        pytest.warns(UserWarning, match="The step is skipped"),
        pytest.raises(PaCAError, match="20 steps before it were skipped in a row"),
    ):
        trainer(tmp_path, nonfinite="skip", max_steps=100, enable_checkpointing=False).fit(module, loader())
    assert module.global_step == 21


def test_a_weight_that_is_broken_itself_is_named(tmp_path: Path) -> None:
    module = Module()
    module.net[2].weight.data[0, 0] = float("nan")
    with pytest.raises(PaCAError, match=r"Optimizer step 1: .*'net.2.weight' itself has NaN or Inf"):
        trainer(tmp_path, enable_checkpointing=False).fit(module, loader())


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_of_broken_weights_is_refused(weights_only: bool, tmp_path: Path) -> None:
    class Breaks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == STEP:
                next(paca_layers(pl_module))[1].paca_delta.data[0, 0] = float("inf")

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_weights_only=weights_only)
    with pytest.raises(PaCAError, match=r"'net.0.paca_delta' has NaN or Inf after step 3, so no checkpoint is written"):
        trainer(tmp_path, Breaks(), saving).fit(Module(), loader())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=0-step=2.ckpt"]


def test_an_accelerator_is_not_waited_for_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = FiniteSteps.first_finding
    monkeypatch.setattr(finite_steps, "is_on_host", lambda _: False)
    monkeypatch.setattr(FiniteSteps, "first_finding", lambda self, t: read.append(t.global_step) or original(self, t))
    module = Poisoned("gradient", float("nan"), (1,))
    complaint = r"Optimizer step 2: 1 of 2 gradients .* The step and those after it are lost; checkpoints"
    with pytest.raises(PaCAError, match=complaint):
        trainer(tmp_path, enable_checkpointing=False, log_every_n_steps=4).fit(module, loader())
    assert read == [3]


def test_a_finding_that_is_read_later_names_the_parameter_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BreaksTheFirst(TwoOptimizers):
        def on_train_start(self) -> None:
            delta = self.net[0].paca_delta
            delta.register_hook(lambda gradient: gradient * float("nan") if self.global_step == 0 else gradient)

    monkeypatch.setattr(finite_steps, "is_on_host", lambda _: False)
    complaint = r"Optimizer step 1: 1 of 2 gradients have NaN or Inf, in the backward 'net.0.paca_delta' first"
    with pytest.raises(PaCAError, match=complaint):
        trainer(tmp_path, enable_checkpointing=False, log_every_n_steps=4).fit(BreaksTheFirst(), loader())


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(PaCAError, match=r"nonfinite='stopp' is unknown\. Choose stop or skip"):
        PaCAStrategy(nonfinite="stopp")  # type: ignore[arg-type]
