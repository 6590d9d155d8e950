"""Commands that one of ours starts, forked from the server that has the imports done: less than half the work."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO

import pytest

from tests.distributed_launch import CONTEXT
from tests.processes import lead_group, write_output_to

CLI = [sys.executable, "-m", "paca_lightning.cli"]


@contextmanager
def forked_commands(module: ModuleType) -> Iterator[None]:
    """While the context lasts, a module of ours that starts commands of ours by ``subprocess.Popen`` forks them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": ForkedCommand}))
        yield


class ForkedCommand:
    """The part of ``subprocess.Popen`` that is used of a process which writes all it says to a file.

    Args:
        command: One of ``python -m paca_lightning.cli``.
        stdin: ``DEVNULL``.
        stdout: An open file.
        stderr: ``STDOUT``.
        env: The whole environment.
    """

    def __init__(self, command: Sequence[str], *, stdin: int, stdout: IO[bytes], stderr: int, env: dict[str, str]):
        assert (list(command[:3]), stdin, stderr) == (CLI, subprocess.DEVNULL, subprocess.STDOUT)
        job = (list(command[3:]), os.getcwd(), stdout.name, env)
        self._process = CONTEXT.Process(target=_run, args=job)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It has not ended in that time, in seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(CLI, timeout or 0)
        return self.returncode

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def _run(arguments: list[str], directory: str, log: str, environment: dict[str, str]) -> None:
    from paca_lightning.cli import main

    lead_group()
    write_output_to(Path(log))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = ["paca-lightning"]
    main(arguments)
