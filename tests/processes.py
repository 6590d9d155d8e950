"""Processes that tests start. None outlives its test, whether it passes, fails or hangs."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

HANG = 600
"""Seconds after which a process counts as hung. No test may depend on how fast the machine is."""


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; at the end the whole group is killed, with all that it launched.

    Args:
        command: Program and arguments.
        **options: For ``subprocess.Popen``.
    """
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill_group(process.pid)
        process.wait()


def run(
    command: Sequence[str], *, directory: Path | None = None, env: dict[str, str] | None = None, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return its exit code, stdout and stderr.

    Args:
        command: Program and arguments.
        directory: Where it runs. Default: here.
        env: Variables in addition to those of this process.
        given: Its stdin.

    Raises:
        AssertionError: If it has not ended after ``HANG`` seconds.
    """
    options: dict[str, Any] = {"cwd": directory, "env": os.environ | (env or {})}
    with started(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, **options) as process:
        try:
            output, errors = process.communicate(given, timeout=HANG)
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
            output, errors = process.communicate()
            raise AssertionError(f"{command} did not end within {HANG} s:\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def write_output_to(log: Path) -> None:
    """Send all that this process prints from now on to a file."""
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def kill_group(leader: int) -> None:
    """Kill the process group that a process leads, if there is still one."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def lead_group() -> int:
    """Make this process lead a group, so that `kill_group` ends it, and let it end with its parent. Returns its id."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    return os.getpid()
