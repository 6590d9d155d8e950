"""Runs code on the simulated HPU, in processes of its own: the device would change other tests in pytest's."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from tests import processes

Run = Callable[..., Any]

BRIDGE = Path(__file__).with_name("bridge")
ROOT = Path(__file__).parents[2]


def gaudi_host(library: Path, *, autoload: bool = True) -> dict[str, str]:
    """The environment of a host with the simulated Gaudi software, which PyTorch loads by itself unless told not to."""
    return {
        "SIMULATED_HPU_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(BRIDGE), str(ROOT)]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)),
    }


@contextmanager
def hpu_process(library: Path, *, autoload: bool) -> Iterator[Run]:
    """A process on a host with the simulated Gaudi software, as ``run(function, *args, **kwargs)``.

    The function must be importable; its result or exception comes back pickled.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        # The process starts with the first task, and with this one's environment and path. It computes with as many
        # threads, so that sums are rounded alike.
        host = mock.patch.dict(os.environ, gaudi_host(library, autoload=autoload))
        with host, mock.patch.object(sys, "path", [str(BRIDGE), *sys.path]):
            pid = pool.submit(processes.lead_group).result(timeout=processes.HANG)
        # Longer than ranks that the function starts, which would otherwise be left behind.
        timeout = processes.HANG + 60
        try:
            yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=timeout)
        finally:
            processes.kill_group(pid)


def launch(module: str, *arguments: str, library: Path) -> str:
    """Runs ``python -m module`` where the simulated Gaudi software is installed, and returns what it printed."""
    ended = processes.run([sys.executable, "-m", module, *arguments], env=gaudi_host(library))
    assert ended.returncode == 0, f"{module} {arguments} failed:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout
