"""Runs a function in fresh processes: the ranks of one job, or one process whose memory nothing else has used."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import start_processes

from paca_lightning.core.errors import PaCAError

# Every process would otherwise import these again, on first use. Python skips those that are not installed.
_PRELOADED = ("torch._dynamo", "transformers.models.llama.modeling_llama", "peft")


def in_fresh_processes(function: Callable[..., Any], *args: Any, ranks: int = 1, device: str = "cpu") -> Any:
    """Call ``function(*args)`` in fresh processes, once in each.

    Several ranks form a process group with the device's backend. They find each other through a file.

    Args:
        function: Importable by name. ``torch.save`` must be able to write its result on rank 0.
        *args: Its arguments.
        ranks: How many processes.
        device: Type of device; each rank uses one.

    Returns:
        What rank 0 returned.

    Raises:
        PaCAError: If the function raised one on rank 0.
        torch.multiprocessing.spawn.ProcessException: If a process failed in another way.
    """
    # A server that has imported everything, but computed nothing, forks each process: fresh, and without delay.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *_PRELOADED])
    with tempfile.TemporaryDirectory() as directory:
        start_processes(
            _rank_main,
            args=(ranks, device, torch.get_num_threads(), directory, function, args),
            nprocs=ranks,
            start_method="forkserver",
        )
        outcome = torch.load(Path(directory, "outcome"), weights_only=False)
    if isinstance(outcome, PaCAError):
        raise outcome
    return outcome


def _rank_main(
    rank: int,
    ranks: int,
    device: str,
    threads: int,
    directory: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    if device != "cpu":
        torch.accelerator.set_device_index(rank)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        store = Path(directory, "store").as_uri()
        backend = dist.get_default_backend_for_device(device)
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    try:
        outcome = function(*args)
    except PaCAError as error:
        outcome = error
    if rank == 0:
        torch.save(outcome, Path(directory, "outcome"))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
