"""Runs a function on several ranks of one host: forked from a server that has the imports done, so quick to start."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import torch

from tests.processes import HANG, kill_group, lead_group

CONTEXT = get_context("forkserver")
# The server imports once for all tests what ranks would otherwise import again. It never computes: autograd's threads
# do not survive a fork.
CONTEXT.set_forkserver_preload(
    [
        "bitsandbytes",
        "datasets",
        "lightning.pytorch",
        "paca_lightning.tasks",
        "paca_lightning.tools.run_config",
        "peft",
        "tests.distributed_training",
        "tests.warm_caches",
        "torch._dynamo",
        "transformers.models.llama.modeling_llama",
    ]
)


def start_server() -> None:
    """Start the server that ranks are forked from, unless it runs."""
    forkserver.ensure_running()


def launch(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank.

    Args:
        function: Importable. A Trainer in it finds its ranks in the environment, as under torchrun.
        ranks: How many processes.
        arguments: Pickled.

    Raises:
        AssertionError: With the traceback, if any rank raises, dies or does not end.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # The ranks meet at this store, as torchrun's do. The kernel chose its port, so that no other test has it.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = (ranks, store.port, Path(scratch), function, arguments)
        # No daemons: those may start no processes, such as workers that load data.
        processes = [CONTEXT.Process(target=_run, args=(rank, *job)) for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            _wait(processes, time.monotonic() + HANG)
        finally:
            for process in processes:
                _end(process)
        errors = [path.read_text() for path in sorted(Path(scratch).glob("*.txt"))]
        codes = [process.exitcode for process in processes]
        assert not any(codes), "\n".join([f"exit codes {codes}", *errors])
        return [torch.load(Path(scratch) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _wait(processes: list[Any], deadline: float) -> None:
    """Wait until all processes have ended, or one has failed and the others had time to report."""
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + 60)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _end(process: Any) -> None:
    """Kill a rank, if it was started, and what it started."""
    if process.pid is not None:
        kill_group(process.pid)
        process.kill()  # a rank that had not come as far as leading a group
        process.join()


def _run(rank: int, ranks: int, port: int, scratch: Path, function: Callable[..., Any], arguments: Any) -> None:
    lead_group()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
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
