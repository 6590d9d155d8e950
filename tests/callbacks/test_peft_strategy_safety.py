"""PEFTStrategy where a run cannot be trusted: NaN in a loss, and an average of packed weights."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from paca_lightning import AdapterCheckpoint, PaCAError, PEFTStrategy
from tests.callbacks.test_peft_strategy import Module, fit, lora, same, trained


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
