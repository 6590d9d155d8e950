"""Memory that is too small, processes that die, a clock that is set back: one message, and the way on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from paca_lightning.tasks.data import loader
from paca_lightning.tasks.data.sampler import BatchOrder
from paca_lightning.tasks.data.stream_loader import StreamLoader
from paca_lightning.tools.checkpoint_search import find_checkpoint
from paca_lightning.tools.lost_ranks import lost_rank
from paca_lightning.tools.machine_faults import fault_of_the_machine
from tests.processes import HANG, started
from tests.test_cli import DEBUG, ROOT, failure, output_to
from tests.test_run_control import endless_run


class Raises(Callback):
    """Fails in the first step as a machine does."""

    error: BaseException = RuntimeError()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        raise self.error


WORKER = "DataLoader worker (pid 7) is killed by signal: Killed. "
PEER = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:24581"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "The memory is too small: CUDA out"),
        (MemoryError(), "The memory is too small: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "The memory is too small"),
        (RuntimeError(WORKER), "A process that prepares batches has died: DataLoader worker (pid 7) is killed"),
        (RuntimeError(PEER), "Another rank has died or stopped: [../third_party"),
    ],
)
def test_a_fault_of_the_machine_is_one_message_with_a_way_on(
    error: BaseException,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Raises, "error", error)
    added = "--trainer.callbacks+=tests.reliability.test_machine_faults.Raises"
    code, message = failure(["fit", *DEBUG, *output_to(tmp_path), added, "--trainer.limit_val_batches=1"], capsys)
    assert code == 2
    assert says in message
    way_on = "paca-lightning estimate --config configs/debug.yaml" if "memory" in says else "Resume the run with"
    assert way_on in message
    assert "Traceback" not in message


class Hangs(Dataset[Any]):
    """Rows, and a stream of batches, on a disk that does not answer."""

    seed = 0

    def __getitems__(self, _: Any) -> Any:
        Event().wait()

    def batches(self, *_: Any) -> Iterator[Any]:
        Event().wait()
        yield


@pytest.mark.parametrize("streamed", [False, True])
def test_a_process_that_hangs_over_a_batch_ends_the_run(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "WORKER_TIMEOUT", 1.0)
    rows: Any = Hangs()
    batches: Any
    if streamed:
        batches = StreamLoader(rows, batches=4, num_workers=2)
    else:
        batches = loader.ResumableLoader(rows, BatchOrder(np.full(8, 5), batch_size=2), list, num_workers=2)
    with pytest.raises(RuntimeError) as raised:
        next(iter(batches))
    fault = fault_of_the_machine(raised.value, [])
    assert "A process that prepares batches hangs: DataLoader timed out after 1.0 seconds." in str(fault)


@pytest.mark.distributed
def test_a_rank_that_loses_another_one_ends_and_names_it(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    with (
        errors.open("w") as stderr,
        endless_run(tmp_path / "run", *two, stderr=stderr, stdout=subprocess.DEVNULL) as first,
    ):
        (other,) = map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split())
        os.kill(other, signal.SIGKILL)
        assert first.wait(HANG) == 2
    assert f"error: Rank 1 of this host (process {other}) was killed by SIGKILL. This rank" in errors.read_text()
    assert "Traceback" not in errors.read_text()


def test_a_rank_that_loses_the_first_one_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("PACA_LIGHTNING_FIRST_RANK", str(os.getppid()))
    assert lost_rank(()) is None
    monkeypatch.setenv("PACA_LIGHTNING_FIRST_RANK", "1000000000")
    assert lost_rank(()) == "Rank 0 of this host (process 1000000000) has died."


def test_a_rank_that_hangs_ends_after_the_first_one_has_died() -> None:
    """As a rank does that waits in NCCL, which does not notice."""
    code = "import os, subprocess, sys, time; from paca_lightning.tools import lost_ranks; lost_ranks.GRACE = 0.1; "
    hangs = code + "lost_ranks.watch_first_rank(); print('ready', flush=True); time.sleep(3600)"
    starts = code + "lost_ranks.watch_first_rank(); "
    starts += f"subprocess.run([sys.executable, '-c', {hangs!r}], env=os.environ | {{'LOCAL_RANK': '1'}})"
    pipe = subprocess.PIPE
    with started([sys.executable, "-c", starts], stdout=pipe, stderr=pipe) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        first.kill()
        _, errors = first.communicate(timeout=HANG)  # returns when the other rank has closed it, too
    assert f"error: Rank 0 of this host (process {first.pid}) has died, so rank 1 ends." in errors


def test_a_bug_is_no_fault_of_the_machine() -> None:
    assert fault_of_the_machine(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), []) is None


def saves_to(directory: Path) -> Trainer:
    saving = ModelCheckpoint(directory / "checkpoints")
    return Trainer(accelerator="cpu", default_root_dir=directory, logger=False, callbacks=[saving])


def saved(directory: Path, name: str, step: int, age: float) -> Path:
    path = directory / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step}, path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_last_is_the_furthest_checkpoint_where_the_clock_was_set_back(tmp_path: Path) -> None:
    saved(tmp_path, "before", 5, -7200)  # of a time to come, as the clock was two hours ahead
    after = saved(tmp_path, "after", 8, 0)
    trainer = saves_to(tmp_path)
    with pytest.warns(UserWarning, match="the clock was set back"):
        assert find_checkpoint("last", trainer) == after


def test_last_is_the_newest_checkpoint_otherwise(tmp_path: Path) -> None:
    saved(tmp_path, "earlier-run", 100, 3600)
    newest = saved(tmp_path, "this-run", 8, 0)
    trainer = saves_to(tmp_path)
    assert find_checkpoint("last", trainer) == newest


def test_the_command_that_predicts_memory_can_be_copied() -> None:
    assert "estimate --config 'a b'" in str(fault_of_the_machine(MemoryError("x"), ["--config", "a b"]))
