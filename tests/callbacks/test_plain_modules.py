"""A module that is not converted takes the weights of a full checkpoint, and refuses an adapter without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from paca_lightning import PaCAConfig, PaCAError, PaCAStrategy, merge
from tests.callbacks.test_paca import DATA, Module, loader, trainer  # noqa: F401  (a fixture)

REFUSED = r"holds a PaCA adapter \('net\.0' is one of 2 layers\).* Module is not converted.*load_adapter\(module"


def fitted(trainer: Any, path: Path, **settings: Any) -> Module:  # noqa: F811
    module = Module()
    config = settings.pop("config", PaCAConfig(r=4))
    saving = ModelCheckpoint(path, save_last=True)
    trainer(PaCAStrategy(config, **settings), saving).fit(module, loader())
    return module


@pytest.mark.parametrize("strict", [None, True, False])
def test_a_full_checkpoint_gives_the_merged_model(trainer: Any, strict: bool | None, tmp_path: Path) -> None:  # noqa: F811
    module = fitted(trainer, tmp_path, full_checkpoints=True)
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt", strict=strict)
    assert torch.equal(loaded.net(DATA), module.net(DATA))
    assert loaded.state_dict().keys() == merge(module).state_dict().keys()
    plain = Module()
    trainer().validate(plain, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(plain.net(DATA), module.net(DATA))


@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize("config", [PaCAConfig(r=4), PaCAConfig(r=4, quantize="nf4")], ids=["dense", "nf4"])
def test_an_adapter_alone_is_refused_with_the_way(
    trainer: Any,  # noqa: F811
    config: PaCAConfig,
    strict: bool | None,
    tmp_path: Path,
) -> None:
    module = fitted(trainer, tmp_path, config=config, full_checkpoints=config.quantize is not None)
    with pytest.raises(PaCAError, match=REFUSED):
        Module.load_from_checkpoint(tmp_path / "last.ckpt", strict=strict)
    with pytest.raises(PaCAError, match=REFUSED):
        trainer().validate(Module(), loader(), ckpt_path=tmp_path / "last.ckpt")
    same = Module()
    trainer(PaCAStrategy(config)).validate(same, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(same.net(DATA), module.net(DATA))


def test_checkpoints_without_paca_are_nobodys_business(trainer: Any, tmp_path: Path) -> None:  # noqa: F811
    module = Module()
    trainer(ModelCheckpoint(tmp_path, save_last=True)).fit(module, loader())
    assert torch.equal(Module.load_from_checkpoint(tmp_path / "last.ckpt").net(DATA), module.net(DATA))
    with pytest.raises(RuntimeError, match="Missing key"):
        Module().load_state_dict({})
