"""Runs code on the simulated HPU, in processes of its own: the device would change other tests in pytest's."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

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
            pool.submit(os.getpid).result(timeout=120)
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=180)


def launch(module: str, *arguments: str, library: Path, timeout: int = 150) -> str:
    """Runs ``python -m module`` where the simulated Gaudi software is installed, and returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment |= gaudi_host(library) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the launched ranks too
        output, _ = process.communicate()
        raise AssertionError(f"{module} {arguments} did not end within {timeout} s:\n{output}") from None
    assert process.returncode == 0, f"{module} {arguments} failed:\n{output}"
    return output
