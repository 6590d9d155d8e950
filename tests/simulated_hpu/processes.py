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

BRIDGE = Path(__file__).with_name("bridge")
ROOT = Path(__file__).parents[2]


@contextmanager
def hpu_process(library: Path) -> Iterator[Callable[..., Any]]:
    """A process in which the simulated Gaudi software is installed, as ``run(function, *args, **kwargs)``.

    The function must be importable; its result or exception comes back pickled. PyTorch is told not to load the bridge
    by itself, so that it is seen when ``paca_lightning`` does.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_install, initargs=(library,)) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=120)


def _install(library: Path) -> None:
    os.environ["SIMULATED_HPU_LIBRARY"] = str(library)
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    sys.path.insert(0, str(BRIDGE))


def launch(module: str, *arguments: str, library: Path, timeout: int = 150) -> str:
    """Runs ``python -m module`` where the simulated Gaudi software is installed, and returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment |= {
        "SIMULATED_HPU_LIBRARY": str(library),
        "PYTHONPATH": os.pathsep.join([str(BRIDGE), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
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
