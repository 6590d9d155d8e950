"""AdapterCheckpoint: the tokenizer of training goes with the adapter, and the best adapter stays."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from transformers import AutoTokenizer

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAError, PaCAStrategy, load_adapter, paca_layers
from paca_lightning.cli import main
from paca_lightning.tasks import CausalLMModule, InstructionDataModule
from paca_lightning.tasks.data.tokenizer import DEFAULT_CHAT_TEMPLATE
from tests.callbacks.test_paca import CONFIG, Module, loader
from tests.tiny import tiny_llama, tiny_tokenizer

OF_THE_MODEL = "{% for message in messages %}{{ '[' + message['content'] + ']' }}{% endfor %}"
OF_THE_USER = "{% for message in messages %}{{ '<' + message['content'] + '>' }}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}{{ ':' }}{% endif %}"


def model_directory(path: Path, chat_template: str | None) -> str:
    tiny_llama().save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(path)
    return str(path)


def conversations(path: Path) -> str:
    rows = [{"instruction": f"What is {n}?", "output": f"{n} is a number."} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(directory: Path, model: str, *callbacks: Any, **data: Any) -> CausalLMModule:
    """Fit a module on a few conversations, and return it."""
    module = CausalLMModule(model)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), *callbacks],
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, InstructionDataModule(model, conversations(directory / "data.jsonl"), **data))
    return module


@pytest.mark.parametrize(
    ("of_the_model", "given", "expected"),
    [
        (None, None, DEFAULT_CHAT_TEMPLATE),
        (None, OF_THE_USER, OF_THE_USER),
        (OF_THE_MODEL, OF_THE_USER, OF_THE_USER),
        (OF_THE_MODEL, None, OF_THE_MODEL),
    ],
)
def test_the_chat_template_of_training_is_that_of_answers_and_exports(
    of_the_model: str | None,
    given: str | None,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_directory(tmp_path / "base", of_the_model)
    module = train(tmp_path, model, AdapterCheckpoint(), chat_template=given, loss_on="all", max_length=64)
    adapter = tmp_path / "adapter"
    loaded = tiny_llama()
    load_adapter(loaded, adapter)
    for (_, layer), (_, trained) in zip(paca_layers(loaded), paca_layers(module), strict=True):
        assert layer.weight.equal(trained.weight)
    for output in ("merged", "lora"):
        arguments = [f"--model={model}", f"--adapter={adapter}", f"--output={tmp_path / output}", f"--format={output}"]
        main(["export", *arguments])
        assert AutoTokenizer.from_pretrained(tmp_path / output).chat_template == expected
    asked: list[str] = []
    monkeypatch.setattr(
        "paca_lightning.tools.generate.answer",
        lambda model, tokenizer, *_, **__: asked.append(tokenizer.chat_template) or "",
    )
    main(["generate", f"--model={model}", f"--adapter={adapter}", "--prompts=hi"])
    assert asked == [expected]


def test_a_data_module_without_a_tokenizer_leaves_an_adapter_alone(tmp_path: Path) -> None:
    data = InstructionDataModule(model_directory(tmp_path / "base", OF_THE_MODEL), conversations(tmp_path / "d.jsonl"))
    data.setup("fit")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), AdapterCheckpoint(str(tmp_path / "adapter"))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLMModule(str(tmp_path / "base")), data.train_dataloader())
    names = {"adapter_config.json", "adapter_model.safetensors", "paca_lightning.json"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == names


class Scripted(Module):
    """Its losses of validation, one an epoch, are given; remembers the delta that each one is of."""

    def __init__(self, *losses: float) -> None:
        super().__init__()
        self.losses = losses
        self.deltas: list[Tensor] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.losses[self.current_epoch])

    def on_validation_end(self) -> None:
        self.deltas.append(self.net[0].paca_delta.detach().clone())


def fit(module: Module, directory: Path, *callbacks: Any, ckpt_path: Path | None = None, **arguments: Any) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=arguments.pop("max_epochs", None) or len(module.losses),
        callbacks=[PaCAStrategy(arguments.pop("config", CONFIG)), *callbacks],
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **arguments,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)


def delta_in(directory: Path) -> Tensor:
    module = Module()
    load_adapter(module, directory)
    return module.net[0].paca_delta.detach()


@pytest.mark.parametrize(
    ("mode", "losses", "best"),
    [("min", (3.0, 1.0, 2.0), 1), ("max", (3.0, 4.0, 2.0), 1), ("min", (float("nan"), 2.0, 3.0), 1)],
)
def test_the_best_adapter_stays(mode: Any, losses: tuple[float, ...], best: int, tmp_path: Path) -> None:
    module = Scripted(*losses)
    last = AdapterCheckpoint(str(tmp_path / "last"))
    fit(module, tmp_path, AdapterCheckpoint(monitor="val/loss", mode=mode), last)
    assert torch.equal(delta_in(tmp_path / "adapter"), module.deltas[best])
    assert torch.equal(delta_in(tmp_path / "last"), module.net[0].paca_delta)
    assert not torch.equal(module.deltas[best], module.deltas[-1])


def test_a_resumed_run_knows_the_best_of_its_checkpoint(tmp_path: Path) -> None:
    first = Scripted(2.0, 1.0)
    fit(first, tmp_path, AdapterCheckpoint(monitor="val/loss"), ModelCheckpoint(tmp_path, filename="half"))
    for losses, best_is_new in (((2.0, 1.0, 1.5), False), ((2.0, 1.0, 0.5), True)):
        second = Scripted(*losses)
        fit(second, tmp_path, AdapterCheckpoint(monitor="val/loss"), ckpt_path=tmp_path / "half.ckpt")
        expected = second.deltas[-1] if best_is_new else first.deltas[-1]
        assert torch.equal(delta_in(tmp_path / "adapter"), expected)
    elsewhere = Scripted(2.0, 1.0, 1.5)
    (tmp_path / "elsewhere").mkdir()
    fit(elsewhere, tmp_path / "elsewhere", AdapterCheckpoint(monitor="val/loss"), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(delta_in(tmp_path / "elsewhere" / "adapter"), elsewhere.deltas[-1])


@pytest.mark.parametrize("in_the_same_directory", [True, False])
def test_a_finished_run_that_is_started_again_keeps_the_best_adapter(
    in_the_same_directory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Scripted(3.0, 1.0, 2.0)
    fit(module, tmp_path, AdapterCheckpoint(monitor="val/loss"), ModelCheckpoint(tmp_path, save_last=True))
    again = tmp_path if in_the_same_directory else tmp_path / "version_1"
    again.mkdir(exist_ok=True)
    arguments: dict[str, Any] = {"ckpt_path": tmp_path / "last.ckpt", "max_epochs": 3}
    fit(Scripted(3.0, 1.0, 2.0), again, AdapterCheckpoint(monitor="val/loss"), **arguments)
    assert torch.equal(delta_in(tmp_path / "adapter"), module.deltas[1])
    if not in_the_same_directory:
        best = f"The adapter with the best val/loss so far (1) stays in {tmp_path / 'adapter'}."
        assert f"Nothing was left to train. {best}" in caplog.messages
        assert list(again.iterdir()) == []


@pytest.mark.parametrize(("mode", "value"), [("min", float("-inf")), ("max", float("inf"))])
def test_an_infinite_metric_is_not_the_best(mode: Any, value: float, tmp_path: Path) -> None:
    module = Scripted(1.0, value, 1.0)
    fit(module, tmp_path, AdapterCheckpoint(monitor="val/loss", mode=mode))
    assert torch.equal(delta_in(tmp_path / "adapter"), module.deltas[0])


@pytest.mark.parametrize("config", [CONFIG, PaCAConfig(r=4, quantize="nf4", selection="activation_norm")])
def test_a_checkpoint_becomes_an_adapter_by_fitting_nothing_more(config: PaCAConfig, tmp_path: Path) -> None:
    module = Scripted(1.0, 2.0)
    saving = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    fit(module, tmp_path, saving, AdapterCheckpoint(str(tmp_path / "last")), config=config)
    arguments: dict[str, Any] = {"ckpt_path": tmp_path / "best.ckpt", "limit_train_batches": 0, "max_epochs": 2}
    fit(Module(), tmp_path, AdapterCheckpoint(), config=config, **arguments)
    assert torch.equal(delta_in(tmp_path / "adapter"), module.deltas[0])
    assert torch.equal(delta_in(tmp_path / "last"), module.deltas[1])


def test_the_adapter_of_a_checkpoint_takes_the_place_of_the_best(tmp_path: Path) -> None:
    module = Scripted(1.0, 2.0)
    each = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    fit(module, tmp_path, AdapterCheckpoint(monitor="val/loss"), each)
    assert torch.equal(delta_in(tmp_path / "adapter"), module.deltas[0])
    arguments: dict[str, Any] = {"ckpt_path": tmp_path / "1.ckpt", "limit_train_batches": 0, "max_epochs": 2}
    fit(Module(), tmp_path, AdapterCheckpoint(monitor="val/loss"), **arguments)
    assert torch.equal(delta_in(tmp_path / "adapter"), module.deltas[1])


def test_a_run_that_goes_back_forgets_the_best_of_the_future(tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    fit(Scripted(3.0, 1.0), tmp_path, AdapterCheckpoint(monitor="val/loss"), each)
    resumed, best = Scripted(4.0, 5.0), AdapterCheckpoint(monitor="val/loss")
    fit(resumed, tmp_path, best, ckpt_path=tmp_path / "0.ckpt")
    assert best.best == 5.0  # of the second epoch, the only one that is left
    assert torch.equal(delta_in(tmp_path / "adapter"), resumed.deltas[0])


class Interrupting(L.Callback):
    """Ctrl-C in the third epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt


def test_ctrl_c_does_not_replace_the_best_adapter(tmp_path: Path) -> None:
    module = Scripted(1.0, 2.0, 3.0)
    with pytest.raises(SystemExit):
        fit(module, tmp_path, AdapterCheckpoint(monitor="val/loss"), Interrupting())
    assert torch.equal(delta_in(tmp_path / "adapter"), module.deltas[0])


def test_without_validation_the_last_adapter_is_written(tmp_path: Path) -> None:
    module = Scripted(1.0)
    early, late = "the run has no validation data", "No validation gave 'val/loss' a value: .* last step, in .*adapter"
    with pytest.warns(UserWarning, match=early), pytest.warns(UserWarning, match=late):
        fit(module, tmp_path, AdapterCheckpoint(monitor="val/loss"), limit_val_batches=0)
    assert torch.equal(delta_in(tmp_path / "adapter"), module.net[0].paca_delta)


@pytest.mark.parametrize(
    ("callbacks", "complaint"),
    [
        (
            [AdapterCheckpoint(monitor="val/los")],
            r"'val/los'\): no such metric is logged. There are .*val/loss",
        ),
        ([AdapterCheckpoint(), AdapterCheckpoint(monitor="val/loss")], "Two callbacks AdapterCheckpoint write"),
        ([AdapterCheckpoint(monitor="val/loss"), EMAWeightAveraging()], "EMAWeightAveraging makes a model of averages"),
    ],
)
def test_what_cannot_be_honoured_is_refused(callbacks: list[Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=complaint):
        fit(Scripted(1.0), tmp_path, *callbacks)
    with pytest.raises(PaCAError, match="mode must be 'min' or 'max', not 'least'"):
        AdapterCheckpoint(mode="least")
