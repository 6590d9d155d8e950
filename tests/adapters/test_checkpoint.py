"""The adapter in a Lightning checkpoint is that of AdapterCheckpoint, bitwise; what cannot be one is refused."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from paca_lightning import (
    AdapterCheckpoint,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    PEFTStrategy,
    apply_paca,
    load_adapter,
    save_adapter,
)
from paca_lightning.adapters.checkpoint import NOTE
from paca_lightning.tools.export import export
from paca_lightning.tools.generate import generate
from tests.adapters.test_adapter import assert_same
from tests.tiny import tiny_llama, tiny_model_directory

ROWS = [{"input_ids": torch.arange(8) + n, "labels": torch.arange(8) + n} for n in range(4)]


class Module(L.LightningModule):
    """A tiny Llama, perhaps with a norm that is thawed before the optimizer is built."""

    def __init__(self, thawed: bool = False, seed: int = 0, **sizes: Any) -> None:
        super().__init__()
        self.model = tiny_llama(seed, **sizes)
        self.thawed = thawed

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.model.model.norm.weight.requires_grad_(self.thawed)
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Saves(L.Callback):
    def __init__(self, path: Path, weights_only: bool) -> None:
        self.path, self.weights_only = path, weights_only

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path, weights_only=self.weights_only)


def fit(directory: Path, module: Module, *callbacks: L.Callback, weights_only: bool = False, **settings: Any) -> None:
    """Train for some steps; leaves ``run.ckpt`` and the directory ``adapter``."""
    saving = [Saves(directory / "run.ckpt", weights_only), AdapterCheckpoint(str(directory / "adapter"))]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks, *saving],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(ROWS, batch_size=2))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    fit(directory, Module(), PaCAStrategy(PaCAConfig(r=4, alpha=8)))
    return directory


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(run / "run.ckpt", tmp_path / "run.ckpt"))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of PaCAStrategy, of the run
    "plain": ({"config": PaCAConfig(r=4, alpha=8)}, {}),
    "weights only": ({"config": PaCAConfig(r=4)}, {"weights_only": True}),
    "full": ({"config": PaCAConfig(r=4), "full_checkpoints": True}, {}),
    "nf4": ({"config": PaCAConfig(r=4, quantize="nf4")}, {}),
    "own steps": ({"config": PaCAConfig(r=4, column_steps="input_rms")}, {}),
    "saved module": ({"config": PaCAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])}, {}),
    "thawed": ({"config": PaCAConfig(r=4)}, {"thawed": True}),
    "bf16": ({"config": PaCAConfig(r=4, modules_to_save=["lm_head"])}, {"precision": "bf16-true"}),
    "averaged": ({"config": PaCAConfig(r=4)}, {"averaged": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_the_adapter_of_its_run_bitwise(case: str, tmp_path: Path) -> None:
    settings, arguments = CASES[case]
    thawed, averaged = arguments.pop("thawed", False), arguments.pop("averaged", False)
    averaging = [EMAWeightAveraging(decay=0.5)] if averaged else []
    fit(tmp_path, Module(thawed), PaCAStrategy(**settings), *averaging, **arguments)
    note = torch.load(tmp_path / "run.ckpt", weights_only=True)[NOTE]
    assert json.loads(json.dumps(note)) == note
    expected, found = tiny_llama(), tiny_llama()
    load_adapter(expected, tmp_path / "adapter")
    load_adapter(found, tmp_path / "run.ckpt")
    assert_same(found, expected)
    save_adapter(found, tmp_path / "again")
    theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in theirs.items() if name.endswith("paca_delta"))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_starts_from_a_checkpoints_adapter(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paca, module = PaCAStrategy(adapter=str(run / "run.ckpt")), Module()
    assert paca.config == PaCAConfig(r=4, alpha=8)
    fit(tmp_path, module, paca, limit_train_batches=0)
    expected = tiny_llama()
    load_adapter(expected, run / "adapter")
    assert_same(module.model, expected)
    assert "checksums" not in caplog.text


def test_generate_and_export_take_a_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = str(tiny_model_directory(tmp_path / "base"))
    answers = []
    for adapter in ("adapter", "run.ckpt"):
        generate(base, "hi", adapter=str(run / adapter), max_new_tokens=8)
        answers.append(capsys.readouterr().out)
        export(base, str(run / adapter), str(tmp_path / "merged" / adapter))
        export(base, str(run / adapter), str(tmp_path / "lora" / adapter), format="lora")
        capsys.readouterr()
    assert answers[0] == answers[1]
    assert f"{run / 'run.ckpt'}: a checkpoint has no tokenizer" in caplog.text
    for kind, file in (("merged", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        expected, found = (load_file(tmp_path / kind / adapter / file) for adapter in ("adapter", "run.ckpt"))
        assert [name for name in expected | found if not torch.equal(expected[name], found[name])] == []


# -- What is refused


def flip(path: Path) -> None:
    """Change one bit of a delta."""
    content = bytearray(path.read_bytes())
    state = torch.load(path, weights_only=True)["state_dict"]
    delta = next(tensor for name, tensor in state.items() if name.endswith("paca_delta"))
    start = content.find(delta.numpy().tobytes())
    assert start > 0
    content[start] ^= 1
    path.write_bytes(content)


def pack(path: Path) -> None:
    """Compress the records, whose bytes PyTorch would take for those of tensors."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return edit


def first_delta(content: dict[str, Any]) -> str:
    return next(name for name in content["state_dict"] if name.endswith("paca_delta"))


def set_delta(value: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        name = first_delta(content)
        content["state_dict"][name] = value(content["state_dict"][name])

    return edited(change)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (flip, r"run\.ckpt is not what was saved: its record .* Copy the checkpoint again"),
        (pack, r"run\.ckpt is not what was saved: its record .*data\.pkl"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"run\.ckpt is cut off"),
        (lambda path: path.write_bytes(b""), r"run\.ckpt is cut off"),
        (lambda path: path.unlink(), r"There is no checkpoint '.*run\.ckpt' \(looked for /"),
        (lambda path: torch.save([1], path), "holds list, not what Lightning writes"),
        (lambda path: torch.save({"a": io.BytesIO()}, path), "cannot be read: it holds an object of _io.BytesIO"),
        (
            edited(lambda content: content.pop("state_dict")),
            "no Lightning checkpoint: it has no state_dict. Of an adapter, give the directory",
        ),
        (edited(lambda content: content.pop(NOTE)), "does not tell how its adapter was made.*limit_train_batches=0"),
        (edited(lambda content: content.update({NOTE: [1]})), "'paca_adapter' is damaged"),
        (edited(lambda content: content[NOTE].pop("layers")), "'paca_adapter' is damaged .KeyError: 'layers'"),
        (edited(lambda content: content[NOTE]["layers"].popitem()), "settings and tensors disagree about"),
        (edited(lambda content: content["state_dict"].pop(first_delta(content))), "lacks the indices or the delta"),
        (set_delta(lambda delta: delta * torch.nan), "has NaN or Inf"),
        (set_delta(lambda delta: delta.double().to(torch.complex64)), "complex64, which no adapter holds"),
        (set_delta(lambda delta: delta[:, :2].clone()), r"was trained with r=4|has shape"),
        (set_delta(lambda delta: torch.zeros(1).expand(10**6, 10**6)), "no plain tensor"),
        (set_delta(lambda delta: delta.to("meta")), "no plain tensor"),
        (set_delta(lambda delta: "text"), "no plain tensor"),
    ],
)
def test_a_checkpoint_that_cannot_be_an_adapter_is_refused(
    damage: Callable[[Path], Any], complaint: str, checkpoint: Path
) -> None:
    damage(checkpoint)
    model = tiny_llama()
    with pytest.raises(PaCAError, match=complaint):
        load_adapter(model, checkpoint)
    assert_same(model, tiny_llama())


def test_a_checkpoint_of_another_base_is_refused(checkpoint: Path) -> None:
    model = tiny_llama(seed=1)
    with pytest.raises(PaCAError, match=r"run\.ckpt: it was trained on another base model"):
        load_adapter(model, checkpoint)
    assert_same(model, tiny_llama(seed=1))


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    import peft

    fit(tmp_path / "lora", Module(), PEFTStrategy(peft.LoraConfig(r=2, target_modules=["q_proj"])))
    trainer = L.Trainer(accelerator="cpu", max_epochs=0, logger=False, enable_progress_bar=False)
    trainer.fit(Module(), DataLoader(ROWS))  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "plain" / "run.ckpt")
    for kind in ("lora", "plain"):
        with pytest.raises(PaCAError, match=r"run\.ckpt has no PaCA adapter"):
            load_adapter(tiny_llama(), tmp_path / kind / "run.ckpt")


def test_a_directory_that_is_neither_names_the_checkpoints_in_it(checkpoint: Path) -> None:
    with pytest.raises(
        PaCAError, match=r"not a complete adapter directory, .* There are checkpoints in it.*: run\.ckpt"
    ):
        load_adapter(tiny_llama(), checkpoint.parent)


def test_an_old_checkpoint_says_where_its_runs_adapter_lies(checkpoint: Path) -> None:
    edited(lambda content: content.pop(NOTE))(checkpoint)
    moved = checkpoint.parent / "checkpoints" / "run.ckpt"
    moved.parent.mkdir()
    checkpoint.rename(moved)
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    save_adapter(model, checkpoint.parent / "adapter")
    with pytest.raises(PaCAError, match=r"the last one of that run may be '.*/adapter'"):
        load_adapter(tiny_llama(), moved)
