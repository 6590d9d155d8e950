"""What to do when the machine fails a run: memory that is too small, a process that has died."""

import re
import shlex
import subprocess
from collections.abc import Sequence

import torch

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.lost_ranks import lost_rank

PEER_IS_GONE = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Read error|remote process (has )?(exited|terminated)|Broken pipe",
    re.I,
)
"""What gloo and NCCL say when the process at the other end has died."""
HOST_IS_FULL = re.compile(r"DefaultCPUAllocator: (can't|not enough)", re.I)
WORKER_DIED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)", re.S)
WORKER_HANGS = "DataLoader timed out"


def fault_of_the_machine(
    error: BaseException, arguments: Sequence[str], launched: Sequence["subprocess.Popen[bytes]"] = ()
) -> PaCAError | None:
    """What a user has to know of an error that is neither theirs nor a bug; None for any other error.

    Args:
        error: What ended a run.
        arguments: Of the run, for the command that predicts its memory.
        launched: Processes of the other ranks of this host, in order, if this one launched them.
    """
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or HOST_IS_FULL.search(text):
        first = text.partition("\n")[0].strip() or type(error).__name__
        return PaCAError(
            f"The memory is too small: {first} Lower the batch size (and raise accumulate_grad_batches) or max_length, "
            "or recompute blocks (activation_checkpointing). This tells what takes the memory, and what fits: "
            f"paca-lightning estimate {shlex.join(arguments)} --budget SIZE"
        )
    if isinstance(error, RuntimeError) and WORKER_DIED.search(text):
        return PaCAError(
            f"A process that prepares batches has died: {text.strip()} If the machine ran out of memory, lower "
            "num_workers. Resume the run with --ckpt_path last."
        )
    if isinstance(error, RuntimeError) and text.startswith(WORKER_HANGS):
        return PaCAError(
            f"A process that prepares batches hangs: {text.strip()}. See whether the disk that holds the data or the "
            "cache answers. Resume the run with --ckpt_path last."
        )
    if isinstance(error, RuntimeError) and PEER_IS_GONE.search(text):
        first_line = text.partition("\n")[0].strip()
        if (lost := lost_rank(launched)) is not None:
            what = f"{lost} This rank cannot go on without it: {first_line} The output of the other rank may say why."
        else:
            what = f"Another rank has died or stopped: {first_line} Its own output says why, and the launcher names it."
        return PaCAError(f"{what} Resume the run with --ckpt_path last.")
    return None
