"""Processes that run trials: each one is a ``paca-lightning fit`` of its own."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.compare.trial import LOG, Trial

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 30
"""How long a process may take to end after SIGTERM: it finishes its step."""


@dataclass
class Running:
    """A trial that runs."""

    trial: Trial
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int
    started: float


class TrialPool:
    """Runs trials, several at a time; at the end of the context those that still run are stopped.

    On a machine with several GPUs, each process sees one of them. On CPUs the processes share the cores, unless
    ``OMP_NUM_THREADS`` says how many threads each has.

    Args:
        jobs: How many trials run at a time.
        metric: What they record.
    """

    def __init__(self, jobs: int, metric: str) -> None:
        self.jobs = jobs
        self.metric = metric
        self.running: list[Running] = []

    def __enter__(self) -> "TrialPool":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.running:
            one.process.terminate()
        for one in self.running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(PATIENCE_SECONDS)
            one.process.kill()
            one.process.wait()
            one.log.close()
        self.running.clear()

    @property
    def has_room(self) -> bool:
        """Whether another trial can start."""
        return len(self.running) < self.jobs

    def start(self, trial: Trial) -> None:
        """Start a trial."""
        config = trial.write(self.metric)
        log = (trial.directory / LOG).open("wb")
        slot = min(set(range(self.jobs)) - {one.slot for one in self.running})
        process = subprocess.Popen(  # noqa: S603  (our own command)
            [sys.executable, "-m", "paca_lightning.cli", "fit", f"--config={config}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment(slot, self.jobs),
        )
        self.running.append(Running(trial, process, log, slot, time.monotonic()))

    def wait(self) -> Running:
        """Wait for a trial to end, and return it.

        Raises:
            PaCAError: If it failed, with what it said and where its log is.
        """
        while True:
            for one in self.running:
                if one.process.poll() is not None:
                    self.running.remove(one)
                    one.log.close()
                    _check(one)
                    return one
            time.sleep(POLL_SECONDS)


def environment(slot: int, jobs: int) -> dict[str, str]:
    """Variables for the process in a slot: its share of the machine."""
    variables = {}
    if (devices := torch.cuda.device_count()) > 1 and jobs > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % devices]
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    return variables


def _check(one: Running) -> None:
    if one.process.returncode == 0 and one.trial.result is not None:
        return
    log = one.trial.directory / LOG
    raise PaCAError(
        f"The run of {one.trial.label} failed (exit code {one.process.returncode}): {last_words(log)}\n"
        f"Its log is {log}. What is finished is kept: the same command goes on from there."
    )


def last_words(log: Path) -> str:
    """The error in a log: what follows ``error:``, or the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if starts:
        return " ".join(lines[starts[-1] :]).removeprefix("error: ")
    return lines[-1] if lines else "it said nothing."
