"""PEFTStrategy where a run cannot be trusted: NaN in a loss, and an average of packed weights."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from packaging.version import Version
from torch import Tensor

from paca_lightning import AdapterCheckpoint, PaCAError, PEFTStrategy
from tests.callbacks.test_peft_strategy import METHODS, Module, fit, lora, same, trained
from tests.peft_warnings import PREFIXES

pytestmark = PREFIXES


class Poisoned(Module):
    """Its third loss is NaN, in one epoch of 4 steps."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss


def test_a_loss_that_is_nan_stops_the_run_before_the_step(tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    broken, sound = Poisoned(), Module()
    with pytest.raises(PaCAError, match=r"Optimizer step 3: .*PEFTStrategy\(nonfinite='skip'\)"):
        fit(broken, tmp_path, PEFTStrategy(lora()), each, AdapterCheckpoint(str(tmp_path / "adapter")), max_steps=4)
    fit(sound, tmp_path, PEFTStrategy(lora()), max_steps=2)
    assert same(trained(broken), trained(sound))
    assert sorted(path.name for path in tmp_path.glob("step=*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]


def test_a_step_whose_loss_is_nan_is_skipped(tmp_path: Path) -> None:
    module = Poisoned()
    with pytest.warns(UserWarning, match="The step is skipped"):
        fit(module, tmp_path, PEFTStrategy(lora(), nonfinite="skip"), max_steps=4)
    assert all(bool(value.isfinite().all()) for value in trained(module).values())


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=1e-3)])
def test_an_average_of_quantized_weights_is_refused(averaging: Any, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"averages all tensors of a model, and the packed NF4 weights of 'model\."):
        fit(Module(intermediate_size=128), tmp_path, PEFTStrategy(lora(), quantize="nf4"), averaging())


def moved(**settings: Any) -> Module:
    """A run's module whose base model is another one: each weight is scaled."""

    class Moved(Module):
        def configure_model(self) -> None:
            if self.model is None:
                super().configure_model()
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter *= 1.5

    return Moved(**settings)


NO_VERA = pytest.mark.xfail(
    Version(peft.__version__) < Version("0.21"),
    raises=PaCAError,
    reason="PEFT 0.20 finds no place for the random matrices of a saved VeRA, so that the adapter is refused",
)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=NO_VERA if name == "vera" else ()) for name in METHODS if name != "p-tuning"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # PEFT's SHiRA
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's LayerNorm tuning, of RMSNorm
def test_a_run_begins_from_an_adapter_of_any_method(method: str, tmp_path: Path) -> None:
    first, second = Module(), Module()
    fit(first, tmp_path, PEFTStrategy(METHODS[method]), AdapterCheckpoint(str(tmp_path / "adapter")), max_steps=2)
    begun = PEFTStrategy(adapter=str(tmp_path / "adapter"))
    fit(second, tmp_path, begun, max_steps=1, limit_train_batches=0, num_sanity_val_steps=0)
    assert same(trained(first), trained(second))


@pytest.mark.parametrize("method", ["lora", "prompt", "layernorm", "shira"])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_an_adapter_and_a_checkpoint_of_another_base_are_refused(method: str, tmp_path: Path) -> None:
    directory = str(tmp_path / "adapter")
    trainer = fit(Module(), tmp_path, PEFTStrategy(METHODS[method]), AdapterCheckpoint(directory), max_steps=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert len(json.loads((tmp_path / "adapter" / "base_samples.json").read_text())) > 2
    with pytest.raises(PaCAError, match=r"base_samples.json: the base model was another one: .* most in 'model\."):
        fit(moved(), tmp_path, PEFTStrategy(METHODS[method], adapter=directory), max_steps=1)
    with pytest.raises(PaCAError, match=r"The checkpoint: the base model was another one"):
        fit(moved(), tmp_path, PEFTStrategy(METHODS[method]), ckpt_path=tmp_path / "run.ckpt", max_steps=2)
    fit(Module(), tmp_path, PEFTStrategy(METHODS[method], adapter=directory), max_steps=1)


def test_a_quantized_base_is_the_base_it_was_made_of(tmp_path: Path) -> None:
    directory = str(tmp_path / "adapter")
    wide = {"intermediate_size": 128}
    fit(Module(**wide), tmp_path, PEFTStrategy(lora()), AdapterCheckpoint(directory), max_steps=1)
    fit(Module(**wide), tmp_path, PEFTStrategy(lora(), adapter=directory, quantize="nf4"), max_steps=1)
    with pytest.raises(PaCAError, match="another one"):
        fit(moved(**wide), tmp_path, PEFTStrategy(lora(), adapter=directory, quantize="nf4"), max_steps=1)


def test_a_head_that_is_trained_whole_does_not_tell_bases_apart(tmp_path: Path) -> None:
    class OtherHead(Module):
        def configure_model(self) -> None:
            super().configure_model()
            torch.nn.init.normal_(self.model.lm_head.weight)

    directory, config = str(tmp_path / "adapter"), lora(modules_to_save=["lm_head"])
    fit(Module(), tmp_path, PEFTStrategy(config), AdapterCheckpoint(directory), max_steps=1)
    fit(OtherHead(), tmp_path, PEFTStrategy(config, adapter=directory), max_steps=1)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": ["b"]}', '{"a": [NaN', '{"a": [true]}'])
def test_damaged_samples_of_a_base_are_refused(content: str, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    fit(Module(), tmp_path, PEFTStrategy(lora()), AdapterCheckpoint(str(directory)), max_steps=1)
    (directory / "base_samples.json").write_text(content)
    with pytest.raises(PaCAError, match=r"base_samples\.json"):
        fit(Module(), tmp_path, PEFTStrategy(lora(), adapter=str(directory)), max_steps=1)
