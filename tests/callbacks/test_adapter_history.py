"""AdapterHistory: adapters along a training, what is known of each, resumed runs, and what is refused."""

import errno
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from transformers import AutoTokenizer

from paca_lightning import AdapterCheckpoint, AdapterHistory, PaCAConfig, PaCAError, PaCAStrategy, load_adapter
from paca_lightning.adapters.history import INDEX, POINT, SUPERSEDED, History, read_history
from paca_lightning.callbacks.point_steps import PointSteps
from paca_lightning.cli import main
from paca_lightning.tasks import CausalLMModule, InstructionDataModule
from tests.callbacks.test_paca import CONFIG, Module, loader
from tests.distributed_launch import launch
from tests.distributed_training import Run, TinyChat, make_trainer
from tests.tiny import tiny_model_directory

BATCHES = 6  # of an epoch of Module's data


class Recorder(L.Callback):
    """Keeps the delta and the loss of each step."""

    def __init__(self) -> None:
        self.deltas: dict[int, Tensor] = {}
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.deltas.setdefault(trainer.global_step, pl_module.net[0].paca_delta.detach().clone())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.deltas[trainer.global_step] = pl_module.net[0].paca_delta.detach().clone()
        self.losses.append(float(outputs["loss"]))


def fit(module: Module, directory: Path, *callbacks: Any, ckpt_path: Path | None = None, **arguments: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, PaCAStrategy(CONFIG)],
        default_root_dir=directory,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "max_epochs": 3} | arguments,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def points(directory: Path) -> dict[int, dict[str, Any]]:
    return {int(path.parent.name[5:]): json.loads(path.read_text()) for path in directory.glob(f"step-*/{POINT}")}


def content(directory: Path) -> dict[str, bytes]:
    """All files of a history, but those it left behind."""
    files = {path.relative_to(directory): path for path in directory.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if name.parts[0] != SUPERSEDED}


@pytest.mark.parametrize(
    ("every", "log_spaced_to", "expected"),
    [
        (1000, 512, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000]),  # Pythia's
        (3, 0, [0, *range(3, 2001, 3)]),
        (700, 8, [0, 1, 2, 4, 8, 700, 1400]),
    ],
)
def test_points_are_evenly_and_log_spaced(every: int, log_spaced_to: int, expected: list[int]) -> None:
    steps = PointSteps(every, log_spaced_to)
    assert [step for step in range(2001) if step in steps] == expected
    assert [steps.after(step) for step in expected[:-1]] == expected[1:]


def test_points_hold_the_adapter_of_their_step(tmp_path: Path) -> None:
    recorder, module = Recorder(), Module()
    history = AdapterHistory(every_n_steps=8, log_spaced_to=4)
    fit(module, tmp_path, history, AdapterCheckpoint(), recorder, max_steps=17)
    written = points(tmp_path / "history")
    assert sorted(written) == [0, 1, 2, 4, 8, 16, 17]
    for step in written:
        loaded = Module()
        load_adapter(loaded, tmp_path / "history" / f"step-{step:08d}")
        assert torch.equal(loaded.net[0].paca_delta, recorder.deltas[step])
    assert not recorder.deltas[0].any()
    names = ("adapter_config.json", "adapter_model.safetensors", "paca_lightning.json")
    last, checkpoint = tmp_path / "history" / "step-00000017", tmp_path / "adapter"
    assert [(last / name).read_bytes() == (checkpoint / name).read_bytes() for name in names] == [True] * 3
    assert read_history(tmp_path / "history").points[17].step == 17


def test_a_point_knows_its_losses_and_its_place_in_the_data(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = fit(Module(), tmp_path, AdapterHistory(every_n_steps=6, log_spaced_to=4), recorder, max_epochs=2)
    written = points(tmp_path / "history")
    losses = [written[step]["train_loss"] for step in (0, 1, 2, 4, 6, 12)]
    means = [sum(recorder.losses[a:b]) / (b - a) for a, b in ((0, 1), (1, 2), (2, 4), (4, 6), (6, 12))]
    assert losses[0] is None
    assert losses[1:] == pytest.approx(means, rel=1e-12)
    held_out = [written[step]["held_out_step"] for step in (0, 1, 2, 4, 6, 12)]
    assert held_out == [None, None, None, None, 6, 12]  # validation comes after the sixth step, and goes to its point
    assert written[12]["held_out_loss"] == float(trainer.callback_metrics["val/loss"])
    assert [(written[step]["epoch"], written[step]["batch"]) for step in (0, 4, 6, 12)] == [
        (0, 0),
        (0, 4),
        (0, 6),
        (1, 6),
    ]
    assert {point["base"] for point in written.values()} == {written[0]["base"]}
    assert [written[step]["tokens"] for step in (0, 1, 12)] == [0, None, None]  # these batches have none


def test_accumulated_micro_batches_are_one_step(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(Module(), tmp_path, AdapterHistory(every_n_steps=1), recorder, max_epochs=1, accumulate_grad_batches=2)
    written = points(tmp_path / "history")
    assert sorted(written) == [0, 1, 2, 3]
    assert [written[step]["train_loss"] for step in (1, 2, 3)] == pytest.approx(
        [sum(recorder.losses[i : i + 2]) for i in (0, 2, 4)], rel=1e-12
    )
    assert [written[step]["batch"] for step in (1, 2, 3)] == [2, 4, 6]


class Killed(RuntimeError):
    pass


class Kill(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and some conversations."""
    directory = tmp_path_factory.mktemp("chat")
    rows = [{"instruction": f"What is {n}?", "output": f"{n} is a number, {'and ' * (n % 3)}so on."} for n in range(14)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_model_directory(directory / "model"), directory / "data.jsonl"


def chat_run(
    chat: tuple[Path, Path],
    directory: Path,
    history: AdapterHistory,
    *callbacks: Any,
    method: Any = None,
    **arguments: Any,
) -> InstructionDataModule:
    """Train seven steps, of four an epoch, with a validation and a checkpoint after every third."""
    method = method or PaCAStrategy(PaCAConfig(r=2))
    L.seed_everything(0, verbose=False)  # some methods begin at random
    model, rows = map(str, chat)
    data = InstructionDataModule(model, rows, validation=rows, batch_size=4)
    saving = ModelCheckpoint(directory / "checkpoints", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=7,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[history, *callbacks, saving, method],
        logger=CSVLogger(directory, name=None),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CausalLMModule(model), data, **arguments)
    return data


def test_a_resumed_run_writes_the_same_history(chat: tuple[Path, Path], tmp_path: Path) -> None:
    """Bit by bit, in the version of the resumed run; the history of the killed one stays."""
    data = chat_run(chat, tmp_path / "whole", AdapterHistory(every_n_steps=1))
    whole = content(tmp_path / "whole" / "version_0" / "history")
    with pytest.raises(Killed):
        chat_run(chat, tmp_path / "killed", AdapterHistory(every_n_steps=1), Kill(5))
    first = tmp_path / "killed" / "version_0" / "history"
    before = content(first)
    assert sorted(points(first)) == [0, 1, 2, 3, 4, 5]
    checkpoint = tmp_path / "killed" / "checkpoints" / "step=3.ckpt"
    chat_run(chat, tmp_path / "killed", AdapterHistory(every_n_steps=1), ckpt_path=checkpoint)
    assert content(tmp_path / "killed" / "version_1" / "history") == whole
    assert content(first) == before

    known = read_history(tmp_path / "whole" / "version_0" / "history").points
    lengths = data.splits["train"].column("length")
    assert known[4].tokens == lengths.sum()
    assert (known[6].held_out_step, known[4].held_out_step, known[7].held_out_step) == (6, 3, 6)
    assert (known[4].epoch, known[4].batch, known[5].epoch, known[5].batch) == (0, 4, 1, 1)


def test_a_resumed_run_goes_on_in_a_directory_that_is_given(chat: tuple[Path, Path], tmp_path: Path) -> None:
    history = tmp_path / "history"
    with pytest.raises(Killed):
        chat_run(chat, tmp_path, AdapterHistory(str(history), every_n_steps=1), Kill(5))
    old = content(history)
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    chat_run(chat, tmp_path, AdapterHistory(str(history), every_n_steps=1), ckpt_path=checkpoint)
    new = content(history)
    assert sorted(points(history)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {name: new[name] for name in old if name != INDEX} == {name: old[name] for name in old if name != INDEX}
    assert sorted(points(history / SUPERSEDED)) == [4, 5]
    with pytest.raises(PaCAError, match=r"holds the history of an earlier run, up to step 7. Resume that run"):
        chat_run(chat, tmp_path, AdapterHistory(str(history), every_n_steps=1))


def test_a_point_answers_with_the_tokenizer_of_training(
    chat: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_run(chat, tmp_path, AdapterHistory(str(tmp_path / "history"), every_n_steps=4, log_spaced_to=0))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "history" / "tokenizer")
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "history" / "tokenizer")
    asked: list[str] = []
    monkeypatch.setattr(
        "paca_lightning.tools.generate.answer",
        lambda model, tokenizer, *_, **__: asked.append(tokenizer.chat_template) or "",
    )
    point = tmp_path / "history" / "step-00000004"
    main(["generate", f"--model={chat[0]}", f"--adapter={point}", "--prompts=hi"])
    assert asked == [tokenizer.chat_template]
    main(["export", f"--model={chat[0]}", f"--adapter={point}", f"--output={tmp_path / 'lora'}", "--format=lora"])
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").chat_template == tokenizer.chat_template


def test_a_run_starts_from_any_point(tmp_path: Path) -> None:
    fit(Module(), tmp_path, AdapterHistory(every_n_steps=6))
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[PaCAStrategy(adapter=str(tmp_path / "history" / "step-00000006"))],
        logger=False,
        enable_progress_bar=False,
    )
    loss = trainer.validate(module, loader(), verbose=False)[0]["val/loss"]
    assert loss == points(tmp_path / "history")[6]["held_out_loss"]


@pytest.mark.parametrize(
    ("callbacks", "complaint"),
    [
        ([AdapterHistory(metric="val/los")], r"AdapterHistory\(metric='val/los'\): validation logged no such metric"),
        ([AdapterHistory(), AdapterHistory(every_n_steps=2)], r"Two callbacks AdapterHistory write to '.*history'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(callbacks: list[Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=complaint):
        fit(Module(), tmp_path, *callbacks)
    assert not (tmp_path / "history").exists()


def test_wrong_settings_and_a_run_without_paca_are_refused(tmp_path: Path) -> None:
    for settings in ({"every_n_steps": 0}, {"log_spaced_to": -1}):
        with pytest.raises(PaCAError, match=r"every_n_steps=.* must be at least 1, and log_spaced_to"):
            AdapterHistory(**settings)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[AdapterHistory()], logger=False, default_root_dir=tmp_path
    )
    with pytest.raises(PaCAError, match="no layer is trained by PaCA"):
        trainer.fit(Module(), loader(), loader())


class OtherBase(Module):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.normal_(self.net[0].weight, generator=torch.Generator().manual_seed(5))


def test_a_history_of_another_base_model_is_refused(tmp_path: Path) -> None:
    history = tmp_path / "history"
    fit(Module(), tmp_path, AdapterHistory(str(history), every_n_steps=6), max_epochs=1)
    for step in (1, 2, 4, 6):
        shutil.rmtree(history / f"step-{step:08d}")
    with pytest.raises(PaCAError, match=r"step 1 is missing .4 of the 5 steps in history.json"):
        fit(Module(), tmp_path, AdapterHistory(str(history)), max_epochs=1)
    (history / INDEX).unlink()
    with pytest.raises(PaCAError, match=r"another base model, or on other columns, .* most in 'net.0'"):
        fit(OtherBase(), tmp_path, AdapterHistory(str(history)), max_epochs=1)
    fit(Module(), tmp_path, AdapterHistory(str(history), every_n_steps=3, log_spaced_to=0), max_epochs=1)
    assert json.loads((history / INDEX).read_text())["points"] == [points(history)[step] for step in (0, 3, 6)]


def test_a_history_is_read_without_its_index_and_damage_is_named(tmp_path: Path) -> None:
    fit(Module(), tmp_path, AdapterHistory(every_n_steps=6), max_epochs=1)
    history = tmp_path / "history"
    expected = read_history(history).points
    (history / INDEX).unlink()
    assert read_history(history).points == expected
    (history / "step-00000009").mkdir()  # not complete, as of a copy that was cut off
    assert read_history(history).points == expected
    History(history).update(0, held_out_loss=1.0)  # writes the index
    with pytest.raises(PaCAError, match=r"is one step of a history\. Give the history"):
        read_history(history / "step-00000006")
    (history / "step-00000006" / POINT).write_text('{"step": 6}')
    with pytest.raises(PaCAError, match=r"point.json is damaged: a point has the fields"):
        read_history(history)
    for empty in (tmp_path / "empty", tmp_path / "gone"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(PaCAError, match=r"holds no history|does not exist"):
            read_history(empty)


def write_sharded(directory: Path) -> None:
    """On each rank: two steps, sharded."""
    run = Run(steps=2, strategy={})
    history = AdapterHistory(str(directory / "sharded"), every_n_steps=1)
    make_trainer(run, callbacks=[history, PaCAStrategy(run.config)], limit_val_batches=0).fit(TinyChat())


def write_on_each_rank(directory: Path) -> None:
    write_sharded(directory)
    ranks = Run(steps=2)
    history = AdapterHistory(str(directory / "ddp"), every_n_steps=1)
    callbacks = [history, PaCAStrategy(ranks.config)]
    make_trainer(ranks, callbacks=callbacks, devices=2, strategy="ddp", limit_val_batches=0).fit(TinyChat())


@pytest.mark.distributed
def test_the_first_rank_writes_what_one_process_does(tmp_path: Path) -> None:
    launch(write_on_each_rank, 2, tmp_path)
    run = Run(steps=2)
    callbacks = [AdapterHistory(str(tmp_path / "one"), every_n_steps=1), PaCAStrategy(run.config)]
    make_trainer(run, callbacks=callbacks, limit_val_batches=0).fit(TinyChat())
    one = read_history(tmp_path / "one")
    for other in ("ddp", "sharded"):
        history = read_history(tmp_path / other)
        assert sorted(history.points) == [0, 1, 2]
        for step, point in history.points.items():
            assert (point.base, point.epoch, point.batch) == (one.points[0].base, 0, step)
            # The ranks' halves of a batch are summed in another order: rounding of fp32.
            if step:
                assert point.train_loss == pytest.approx(one.points[step].train_loss, rel=1e-5)
        loaded, expected = TinyChat(in_init=True), TinyChat(in_init=True)
        load_adapter(loaded, history.path(2))
        load_adapter(expected, one.path(2))
        for (name, ours), theirs in zip(loaded.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)


def said_of_a_full_disk(directory: Path) -> str:
    """On each rank: a sharded run whose first rank, which alone writes, finds the disk full."""
    full = OSError(errno.ENOSPC, "No space left on device")
    first = os.environ["RANK"] == "0"
    failing = mock.patch("tempfile.mkdtemp", side_effect=full) if first else nullcontext()
    with failing, pytest.raises(PaCAError) as told:
        write_sharded(directory)
    return str(told.value)


@pytest.mark.distributed
def test_all_ranks_end_where_the_first_one_cannot_write(tmp_path: Path) -> None:
    for message in launch(said_of_a_full_disk, 2, tmp_path):
        assert "step-00000000' could not be written: [Errno 28] No space left on device" in message
