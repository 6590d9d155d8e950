"""Each model in a LightningModule: a fit, a resume, an adapter's round trip and a merge."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning import (
    ConversionReport,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
)
from paca_lightning.layers.base import PaCALayer
from tests.guests.checks import is_written, same_state
from tests.guests.models import MODELS, Guest

pytestmark = pytest.mark.guests
ALL = torch.arange(8)


class Visited(pl.LightningModule):
    """Somebody's LightningModule around a guest."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        self.guest, self.net = guest, guest.seeded()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.guest.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fitted(guest: Guest, path: Path, ckpt_path: str | None = None) -> tuple[Visited, PaCAStrategy]:
    module, strategy = Visited(guest), PaCAStrategy(guest.config)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[strategy, ModelCheckpoint(path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")],
    )
    trainer.fit(module, DataLoader(ALL, batch_size=4), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return module, strategy


def loss_of(guest: Guest, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return guest.loss(model.eval(), ALL)


def frozen_elsewhere(module: nn.Module, report: ConversionReport) -> list[str]:
    """Frozen parameters but the weights of PaCA layers, and of linear layers that were left alone."""
    told = {path for path, _ in paca_layers(module)} | report.skipped.keys()
    frozen = [name.rpartition(".") for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return [f"{path}.{own}" for path, _, own in frozen if own == "bias" or path not in told]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_fitted_resumed_saved_and_merged(name: str, tmp_path: Path) -> None:
    guest = MODELS[name]
    module, strategy = fitted(guest, tmp_path / "whole")
    layers = dict(paca_layers(module))
    assert strategy.report is not None
    assert len(layers) == guest.layers, strategy.report
    assert all(layer.paca_delta.any() for layer in layers.values())
    assert is_written(module)
    if guest.left is not None:
        assert set(strategy.report.skipped) == {f"net.{path}" for path in guest.left}
        assert sum(group.tensors for group in strategy.report.frozen) == len(frozen_elsewhere(module, strategy.report))
    assert loss_of(guest, module.net) < loss_of(guest, guest.seeded())

    resumed, _ = fitted(guest, tmp_path / "resumed", str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert same_state(resumed, module)

    save_adapter(module, tmp_path / "adapter")
    loaded = Visited(guest)
    load_adapter(loaded, tmp_path / "adapter")
    expected_loss = loss_of(guest, module.net)
    assert torch.equal(loss_of(guest, loaded.net), expected_loss)

    merge(module)
    assert not any(isinstance(part, PaCALayer) for part in module.modules())
    assert torch.equal(loss_of(guest, module.net), expected_loss)


def test_a_head_that_is_left_frozen_is_told(tmp_path: Path) -> None:
    guest = MODELS["a vision transformer built as torchvision's"]
    forgetful = Guest(guest.build, guest.loss, guest.library, guest.layers, PaCAConfig(r=2))
    told = r"'net\.heads\.output' is frozen, and zero, so that no layer before it gets a gradient"
    with pytest.warns(UserWarning, match=told), pytest.raises(PaCAError, match="No delta has moved in this run"):
        fitted(forgetful, tmp_path)
