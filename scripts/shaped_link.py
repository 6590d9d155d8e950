"""Times exchanges of two replicas of DiLoCo over a link of a given rate, beside what bytes over bandwidth says.

    sudo env "PATH=$PATH" python -m scripts.shaped_link --megabits 100 10

Linux alone, as root: each replica is a process in a network namespace of its own, and Linux's token bucket filter (`tc
... tbf`) shapes what it sends. Parameters have the shapes of SmolLM2-135M's columns at r 16: 2,488,320 values in fp32,
which a random step moves before each exchange. Measured is the optimizer step that holds the exchange, on the replica
that came last, so that waiting for the other does not count.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchft.coordination import LighthouseServer

from paca_lightning.strategies.diloco.outer import OuterLoop
from paca_lightning.strategies.diloco.settings import Compression, Outer

LAYERS, RANK = 30, 16
OUT_FEATURES = (576, 192, 192, 576, 1536, 1536, 576)
"""Of the linear layers of one of SmolLM2-135M's blocks."""
NAMES, ADDRESSES, PORT = ("paca-link-0", "paca-link-1"), ("10.77.0.1", "10.77.0.2"), 29510
EXCHANGES = 4
"""The first one, in which replicas connect, is left out."""


class Run:
    """A run around the outer loop, which never ends."""

    def identity(self) -> list[str | Tensor]:
        """Nothing that replicas could differ in."""
        return ["link"]

    def position(self) -> dict[str, Any]:
        """Nothing that a late replica would take over."""
        return {}

    def take_position(self, position: dict[str, Any]) -> None:
        """Both replicas begin together."""
        raise RuntimeError("a replica came late")

    def at_last_step(self) -> bool:
        """There is none."""
        return False

    def exchanged(self, loop: OuterLoop) -> None:
        """Stop where an exchange failed, whose time would mean nothing."""
        if loop.failed:
            raise RuntimeError("an exchange failed")


def replica(number: int, file: Path) -> None:
    """Exchange as one replica, by each compression in turn, and write the seconds and the bytes of each exchange.

    The first one also runs the lighthouses, one for each compression.
    """
    found = {}
    for place, compression in enumerate(get_args(Compression)):
        port = PORT + place
        server = LighthouseServer(bind=f"0.0.0.0:{port}", min_replicas=2, join_timeout_ms=60000) if not number else None
        _wait_for(ADDRESSES[0], port)
        found[compression] = exchanges(number, compression, f"http://{ADDRESSES[0]}:{port}")
        if server is not None:
            time.sleep(2)  # until the other replica has left as well
            server.shutdown()
    file.write_text(json.dumps(found), encoding="utf-8")


def exchanges(number: int, compression: Compression, lighthouse: str) -> dict[str, Any]:
    """The seconds of some exchanges, and the bytes that one sends."""
    shapes = [(features, RANK) for _ in range(LAYERS) for features in OUT_FEATURES]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    settings, timeout = Outer(sync_every=1, compression=compression), timedelta(seconds=120)
    loop = OuterLoop(optimizer, settings, Run(), replica=number, lighthouse=lighthouse, min_replicas=2, timeout=timeout)
    generator, times, sent = torch.Generator().manual_seed(number), [], [0]
    for _ in range(EXCHANGES):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        began = time.monotonic()
        optimizer.step()
        times.append(time.monotonic() - began)
        sent.append(loop.group.sent_bytes)
    loop.close()
    return {"seconds": times, "bytes": sent[-1] - sent[-2]}


def _wait_for(host: str, port: int) -> None:
    """Wait until a port is open."""
    for _ in range(600):
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no lighthouse at {host}:{port}")


@contextmanager
def shaped_link(megabits: float) -> Iterator[None]:
    """Two network namespaces with a link between them, each of whose ends sends at a rate."""
    try:
        for name in NAMES:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", "paca0", "netns", NAMES[0], "type", "veth", "peer", "paca1", "netns", NAMES[1])
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            device = f"paca{number}"
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", name, "link", "set", device, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            rate = ("rate", f"{megabits}mbit", "burst", "128kb", "latency", "300ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", *rate)
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)  # noqa: S603, S607 - one may not be there


def measure() -> dict[str, tuple[float, int]]:
    """The median seconds of an exchange over the present link and the bytes that each replica sends, by compression."""
    with TemporaryDirectory() as directory:
        files = [Path(directory) / f"{number}.json" for number in range(2)]
        own = [sys.executable, "-m", "scripts.shaped_link", "--replica"]
        replicas = [
            subprocess.Popen(["ip", "netns", "exec", NAMES[n], *own, str(n), "--file", str(files[n])])  # noqa: S603, S607
            for n in range(2)
        ]
        if codes := [code for code in (each.wait() for each in replicas) if code]:
            raise RuntimeError(f"a replica ended with {codes[0]}")
        both = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    found = {}
    for compression, first in both[0].items():
        pairs = zip(first["seconds"][1:], both[1][compression]["seconds"][1:], strict=True)
        found[compression] = statistics.median(map(min, pairs)), first["bytes"]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure each compression over each link, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabits", type=float, nargs="+", default=[100.0, 10.0], help="of the link, each way")
    parser.add_argument("--replica", type=int, choices=(0, 1), help="used by the command itself, as is the next")
    parser.add_argument("--file", type=Path)
    given = parser.parse_args(arguments)
    if given.replica is not None:
        replica(given.replica, given.file)
        return
    print("| link | compression | MB sent by each | seconds, measured | seconds, computed |\n|---|---|---|---|---|")
    for megabits in given.megabits:
        with shaped_link(megabits):
            for compression, (seconds, sent) in measure().items():
                computed = sent * 8e-6 / megabits
                link = f"{megabits:g} Mbit/s"
                print(f"| {link} | `{compression}` | {sent / 1e6:.2f} | {seconds:.2f} | {computed:.2f} |", flush=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)  # noqa: S603 - no input of a user is in it


if __name__ == "__main__":
    main()
