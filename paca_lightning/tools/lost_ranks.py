"""Which rank of a run has died, and the end of ranks whose first rank has."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

FIRST_RANK = "PACA_LIGHTNING_FIRST_RANK"
"""In the environment of the ranks that Lightning launches: the process of the first one, which launches them."""
LOCAL_RANK = "LOCAL_RANK"
GRACE = 20.0
"""Seconds for a rank to end by itself after another one: its collectives may tell it, or it may be done."""
REAPED = 5.0
"""Seconds in which the exit of a process that closed its connections is seen."""


def watch_first_rank() -> None:
    """End this rank soon after the first one, if that launched it: NCCL would wait for minutes.

    Collectives over gloo fail at once when a rank dies. Those of NCCL do not, and the process that would end the others
    is the one that is gone. The first rank only notes who it is.
    """
    if os.environ.get(LOCAL_RANK, "0") == "0":
        os.environ[FIRST_RANK] = str(os.getpid())
    elif os.environ.get(FIRST_RANK) == str(os.getppid()):
        threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True, name="first-rank-observer").start()


def _end_after(first: int) -> None:
    while os.getppid() == first:
        time.sleep(min(1.0, GRACE))
    time.sleep(GRACE)
    ends = f"so rank {os.environ[LOCAL_RANK]} ends. Resume the run with --ckpt_path last."
    print(f"error: Rank 0 of this host (process {first}) has died, {ends}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # the main thread may hang in a collective


def lost_rank(launched: Sequence["subprocess.Popen[bytes]"]) -> str | None:
    """How a rank has ended that another one lost its connection to; None if that is not known here.

    Args:
        launched: The processes of ranks 1, 2, ... of this host, if this is the rank that launched them.
    """
    first = os.environ.get(FIRST_RANK)
    if os.environ.get(LOCAL_RANK, "0") != "0":
        died = first is not None and os.getppid() != int(first)
        return f"Rank 0 of this host (process {first}) has died." if died else None
    deadline = time.monotonic() + REAPED
    while launched and all(process.poll() in (None, 0) for process in launched) and time.monotonic() < deadline:
        time.sleep(0.05)
    ends = [(process.poll(), rank, process.pid) for rank, process in enumerate(launched, 1) if process.poll()]
    if not ends:
        return None
    code, rank, process_id = min(ends)  # killed by a signal (below 0) before those that lost it
    assert code is not None
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"Rank {rank} of this host (process {process_id}) {how}."
