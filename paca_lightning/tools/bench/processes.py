"""Runs a function in fresh processes: several ranks of one job, or one process whose memory nobody else has used."""

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

# Imported on first use otherwise, by every process again. Those that are not installed are passed over.
_PRELOADED = ("torch._dynamo", "transformers.models.llama.modeling_llama", "peft")


def in_fresh_processes(function: Callable[..., Any], *args: Any, ranks: int = 1, device: str = "cpu") -> Any:
    """Call ``function(*args)`` once in each of some fresh processes.

    Several ranks find each other through a file, in a process group with the device's backend.

    Args:
        function: Importable by name. Its result on rank 0 must be something ``torch.save`` can write.
        *args: Its arguments.
        ranks: How many processes.
        device: Type of device that they use, one each.

    Returns:
        What rank 0 returned.

    Raises:
        PaCAError: If the function raised one.
        torch.multiprocessing.spawn.ProcessException: If a process failed in another way.
    """
    # A server that has imported everything and computed nothing forks each of them: fresh, and there at once.
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
