"""StopSignals: a stopped run keeps its adapter and a checkpoint, and goes on from it as if it had not been stopped."""

import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import Tensor

from paca_lightning import AdapterCheckpoint, PaCAConfig, PaCAStrategy, load_adapter, paca_layers
from paca_lightning.callbacks.stop_signals import StopSignals
from paca_lightning.tasks import CausalLMModule, InstructionDataModule
from tests.callbacks.test_adapter_checkpoint import ANSWER, OF_THE_MODEL, conversations, model_directory
from tests.distributed_launch import launch
from tests.tiny import tiny_llama


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As in a shell, and left so: Lightning ignores SIGINT once it has saved."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Signal(L.Callback):
    """Sends this process a signal in a hook, once, when a number of steps is done."""

    def __init__(self, number: int, hook: str = "on_before_backward", steps: int = 2, times: int = 1) -> None:
        self.number, self.steps, self.times = number, steps, times
        self.sent = False
        setattr(self, hook, self._send)

    def _send(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps and not self.sent and not trainer.sanity_checking:
            self.sent = True
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class Validated(L.Callback):
    """Remembers each validation: the step, and the loss."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


def fit(directory: Path, *callbacks: L.Callback, ckpt_path: Path | None = None, **settings: Any) -> CausalLMModule:
    """Eight steps, with a validation after every fourth."""
    directory.mkdir(exist_ok=True)
    base = directory.parent / "base"
    if not base.exists():
        model_directory(base, OF_THE_MODEL + ANSWER)
    rows = conversations(directory.parent / "rows.jsonl")
    module = CausalLMModule(str(base), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    data = InstructionDataModule(
        str(base), rows, rows, max_length=64, batch_size=1, cache_dir=str(directory.parent / "cache"), loss_on="all"
    )
    defaults: dict[str, Any] = {"devices": 1, "max_epochs": 1, "val_check_interval": 4, "num_sanity_val_steps": 1}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[PaCAStrategy(PaCAConfig(r=4)), *callbacks, ModelCheckpoint(directory), StopSignals()],
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | settings),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


def deltas(module: torch.nn.Module) -> list[Tensor]:
    return [layer.paca_delta.detach().clone() for _, layer in paca_layers(module)]


def deltas_in(adapter: Path) -> list[Tensor]:
    model = tiny_llama()
    load_adapter(model, adapter)
    return deltas(model)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("hook", "steps", "settings", "validations_left"),
    [
        ("on_before_backward", 2, {}, [4, 8]),
        ("on_before_optimizer_step", 5, {}, [8]),
        ("on_train_batch_start", 7, {}, []),  # Lightning takes the validation after the saved step for done
        ("on_validation_batch_start", 4, {}, [4, 8]),
        ("on_validation_batch_end", 4, {}, [4, 8]),
        ("on_validation_batch_start", 8, {}, [8]),
        ("on_before_backward", 1, {"accumulate_grad_batches": 3, "max_epochs": 2}, [3, 4, 6]),
    ],
)
def test_sigterm_leaves_an_adapter_and_a_checkpoint_that_goes_on_exactly(
    hook: str, steps: int, settings: dict[str, Any], validations_left: list[int], tmp_path: Path
) -> None:
    whole, resumed = Validated(), Validated()
    expected = fit(tmp_path / "whole", whole, **settings)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", AdapterCheckpoint(), Signal(signal.SIGTERM, hook, steps), **settings)
    assert stop.value.code == 143
    checkpoint = tmp_path / "run" / "interrupted.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, delta in zip(
        (name for name in saved if name.endswith("paca_delta")), deltas_in(tmp_path / "run" / "adapter"), strict=True
    ):
        assert torch.equal(saved[name], delta)
        assert delta.any()
    module = fit(tmp_path / "run", resumed, ckpt_path=checkpoint, **settings)
    assert same(deltas(module), deltas(expected))
    assert [step for step, _ in resumed.losses] == validations_left
    assert set(resumed.losses) <= set(whole.losses)


def test_the_present_step_is_completed_and_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    done = []

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            done.append(trainer.global_step)

    for times in (1, 2):
        done.clear()
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path / str(times), AdapterCheckpoint(), Steps(), Signal(signal.SIGTERM, times=times))
        assert stop.value.code == 143
        assert done == [1, 2, 3][: 4 - times]
        assert (tmp_path / str(times) / "interrupted.ckpt").exists() == (times == 1)
        assert any(delta.any() for delta in deltas_in(tmp_path / str(times) / "adapter"))


def test_ctrl_c_is_as_gentle(tmp_path: Path) -> None:
    expected = fit(tmp_path / "whole")
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", AdapterCheckpoint(), Signal(signal.SIGINT))
    module = fit(tmp_path / "run", ckpt_path=tmp_path / "run" / "interrupted.ckpt")
    assert same(deltas(module), deltas(expected))


@pytest.mark.parametrize("times", [1, 2])  # the kernel and the shell may send one each
def test_a_closed_terminal_is_as_gentle(times: int, tmp_path: Path) -> None:
    expected = fit(tmp_path / "whole")
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", AdapterCheckpoint(), Signal(signal.SIGHUP, times=times))
    assert stop.value.code == 129
    module = fit(tmp_path / "run", ckpt_path=tmp_path / "run" / "interrupted.ckpt")
    assert same(deltas(module), deltas(expected))


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fit(tmp_path / "run", Signal(signal.SIGINT))
    assert not (tmp_path / "run" / "interrupted.ckpt").exists()


def test_slurm_requeues_between_two_steps_and_the_new_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fit(tmp_path / "whole")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n')
    (binaries / "scontrol").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    for name, value in (slurm | {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}).items():
        monkeypatch.setenv(name, value)
    signals = [Signal(signal.SIGUSR1, steps=2), Signal(signal.SIGTERM, steps=3)]
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "run", *signals, plugins=[SLURMEnvironment()])
    assert stop.value.code == 143
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    saved = torch.load(tmp_path / "run" / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 3  # the step in which the signal came is complete
    module = fit(tmp_path / "run", plugins=[SLURMEnvironment()])
    assert same(deltas(module), deltas(expected))


def stop_one_rank(directory: Path, strategy: str) -> object:
    """Train on several ranks, undisturbed and with SIGTERM on the last rank alone; resume. Returns the exit code."""
    on_this_rank = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    callbacks = [Signal(signal.SIGTERM)] if on_this_rank else []
    settings = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": strategy, "max_epochs": 2}
    fit(directory / "whole", AdapterCheckpoint(), **settings)
    with pytest.raises(SystemExit) as stop:
        fit(directory / "stopped", AdapterCheckpoint(), *callbacks, **settings)
    fit(directory / "resumed", AdapterCheckpoint(), ckpt_path=directory / "stopped" / "interrupted.ckpt", **settings)
    return stop.value.code


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "paca_fsdp2"])
def test_all_ranks_stop_at_the_same_step_and_go_on_exactly(strategy: str, tmp_path: Path) -> None:
    conversations(tmp_path / "rows.jsonl")
    model_directory(tmp_path / "base", OF_THE_MODEL + ANSWER)
    assert launch(stop_one_rank, 2, tmp_path, strategy) == [143, 143]
    stopped, resumed, whole = (deltas_in(tmp_path / name / "adapter") for name in ("stopped", "resumed", "whole"))
    assert any(delta.any() for delta in stopped)
    assert not same(stopped, whole)
    assert same(resumed, whole)


def test_a_validation_that_a_checkpoint_was_saved_before_is_made_up_for(tmp_path: Path) -> None:
    whole, resumed = Validated(), Validated()
    fit(tmp_path / "whole", whole, ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1))
    fit(tmp_path / "resumed", resumed, ckpt_path=tmp_path / "epoch=0-step=4.ckpt")
    assert [step for step, _ in whole.losses] == [4, 8]
    assert resumed.losses == whole.losses


def test_a_resumed_run_saves_no_gradients_away(tmp_path: Path) -> None:
    """The step that it starts from is saved already; saved again while the next one accumulates, it would lose some."""
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    saving = {"every_n_train_steps": 2, "save_top_k": -1}
    fit(tmp_path / "whole", ModelCheckpoint(tmp_path / "one", **saving), **settings)
    first = tmp_path / "one" / "epoch=0-step=2.ckpt"
    fit(tmp_path / "resumed", ModelCheckpoint(tmp_path / "two", **saving), ckpt_path=first, **settings)
    steps = [int(path.stem.partition("step=")[2]) for path in (tmp_path / "two").iterdir()]
    assert sorted(steps) == [4, 6, 8]


class Failing(L.Callback):
    """Fails in the forward of the third step."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise self.error()


def test_an_error_keeps_the_last_adapter_under_its_own_name(tmp_path: Path) -> None:
    after_two_steps = fit(tmp_path / "two", max_steps=2)
    with pytest.raises(ZeroDivisionError, match="of the user"):
        fit(tmp_path / "run", AdapterCheckpoint(), Failing(lambda: ZeroDivisionError("of the user")))
    assert same(deltas_in(tmp_path / "run" / "adapter-interrupted"), deltas(after_two_steps))
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "interrupted.ckpt").exists()


def test_a_stop_keeps_the_last_adapter_beside_the_best(tmp_path: Path) -> None:
    best = AdapterCheckpoint(monitor="val/loss")
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", best, Signal(signal.SIGTERM, steps=6))
    four, seven = fit(tmp_path / "four", max_steps=4), fit(tmp_path / "seven", max_steps=7)
    assert same(deltas_in(tmp_path / "run" / "adapter"), deltas(four))
    assert same(deltas_in(tmp_path / "run" / "adapter-interrupted"), deltas(seven))


def test_an_adapter_that_cannot_be_saved_does_not_hide_the_error(tmp_path: Path) -> None:
    class Diverging(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                next(paca_layers(pl_module))[1].paca_delta.data.fill_(float("nan"))
                raise ZeroDivisionError("of the user")

    with (
        pytest.warns(UserWarning, match="The adapter could not be saved: .* has NaN or Inf"),
        pytest.raises(ZeroDivisionError, match="of the user"),
    ):
        fit(tmp_path / "run", AdapterCheckpoint(), Diverging())
    assert not (tmp_path / "run" / "adapter-interrupted").exists()


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    class Early(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", AdapterCheckpoint(), Early())
    assert [path.name for path in (tmp_path / "run").iterdir()] == []
