"""AdapterHistory beside other methods: adapters of theirs, resumed bit by bit, and directories of others refused."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from paca_lightning import (
    AdapterCheckpoint,
    AdapterHistory,
    BottleneckStrategy,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    PEFTStrategy,
)
from paca_lightning.adapters.history import read_history
from tests.callbacks.test_adapter_history import Kill, Killed, chat, chat_run, content  # noqa: F401
from tests.callbacks.test_peft_strategy import Module, fit, loader

peft = pytest.importorskip("peft")

METHODS: dict[str, Any] = {
    "lora": lambda **more: PEFTStrategy(peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), **more),
    "prompt": lambda **more: PEFTStrategy(peft.PromptTuningConfig(num_virtual_tokens=3), **more),
    "pfeiffer": lambda **more: BottleneckStrategy(4, placement="pfeiffer", **more),
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_a_resumed_run_writes_the_same_history(
    method: str,
    chat: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Bit by bit; the last point is what AdapterCheckpoint writes."""
    make, own = METHODS[method], AdapterCheckpoint()
    chat_run(chat, tmp_path / "whole", AdapterHistory(every_n_steps=1), own, method=make())
    version = tmp_path / "whole" / "version_0"
    whole = content(version / "history")
    last = read_history(version / "history").path(7)
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_samples.json"):
        assert (last / name).read_bytes() == (version / "adapter" / name).read_bytes()
    with pytest.raises(Killed):
        chat_run(chat, tmp_path / "killed", AdapterHistory(every_n_steps=1), Kill(5), method=make())
    saved = tmp_path / "killed" / "checkpoints" / "step=3.ckpt"
    chat_run(chat, tmp_path / "killed", AdapterHistory(every_n_steps=1), method=make(), ckpt_path=saved)
    assert content(tmp_path / "killed" / "version_1" / "history") == whole


class Validated(Module):
    def val_dataloader(self) -> Any:
        return loader()


@every_method
def test_a_run_starts_from_any_point(method: str, tmp_path: Path) -> None:
    make = METHODS[method]
    fit(Validated(), tmp_path, AdapterHistory(every_n_steps=5), make(), max_steps=6, val_check_interval=2)
    point = read_history(tmp_path / "history").path(4)
    strategy = make(adapter=str(point))
    trainer = L.Trainer(accelerator="cpu", callbacks=[strategy], logger=False, enable_progress_bar=False)
    loss = trainer.validate(Module(), loader(), verbose=False)[0]["val/loss"]
    assert loss == read_history(tmp_path / "history").points[4].held_out_loss


class OtherBase(Module):
    def configure_model(self) -> None:
        self.overrides = {"seed": 1}
        super().configure_model()


@pytest.mark.parametrize(
    ("strategy", "module", "complaint"),
    [
        (METHODS["pfeiffer"], Module, "is of an adapter of 'LORA'"),
        (lambda: PaCAStrategy(PaCAConfig(r=2)), Module, "peft_type is 'LORA', not 'PACA'"),
        (lambda: PEFTStrategy(peft.LoraConfig(r=4, target_modules=["q_proj"])), Module, r"with r=2 \(here 4\)"),
        (METHODS["lora"], OtherBase, "the base model was another one"),
    ],
)
def test_a_directory_of_another_run_is_refused(strategy: Any, module: Any, complaint: str, tmp_path: Path) -> None:
    history = AdapterHistory(str(tmp_path / "history"))
    fit(Module(), tmp_path, history, METHODS["lora"](), max_steps=1)
    read_history(tmp_path / "history").path(1).rename(tmp_path / "later")
    (tmp_path / "history" / "history.json").unlink()  # the first point alone, as of a run that was killed at once
    with pytest.raises(PaCAError, match=f"AdapterHistory: the directory holds the history of another run.*{complaint}"):
        fit(module(), tmp_path, AdapterHistory(str(tmp_path / "history")), strategy(), max_steps=1)
