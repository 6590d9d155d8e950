"""Runs a function on several ranks of one host: forked from a server that has the imports done, so quick to start."""

import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

_CONTEXT = get_context("forkserver")
# The server imports these once for all tests. It never computes: autograd's threads do not survive a fork.
_CONTEXT.set_forkserver_preload(["lightning.pytorch", "transformers.models.llama", "tests.distributed_training"])


def launch(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank.

    Args:
        function: Importable. A Trainer in it finds its ranks in the environment, as under torchrun.
        ranks: How many processes.
        arguments: Pickled.
        timeout: Seconds after which the ranks are killed and the test fails.

    Raises:
        AssertionError: With the traceback, if any rank raises, dies or does not end.
    """
    with tempfile.TemporaryDirectory() as scratch:
        port = _free_port()
        processes = [
            _CONTEXT.Process(target=_run, args=(function, rank, ranks, port, Path(scratch), arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(Path(scratch).glob("*.txt"))]
        codes = [process.exitcode for process in processes]
        assert not any(codes), "\n".join([f"exit codes {codes}", *errors])
        return [torch.load(Path(scratch) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _wait(processes: list[Any], deadline: float) -> None:
    """Wait until all processes have ended, or one has failed and the others had time to report."""
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _run(function: Callable[..., Any], rank: int, ranks: int, port: int, scratch: Path, arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), scratch / f"{rank}.pt")
    except BaseException:
        (scratch / f"{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        if torch.distributed.is_initialized() and not list(scratch.glob("*.txt")):
            torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
