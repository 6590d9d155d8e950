"""A lighthouse for replicas."""

from collections.abc import Callable, Iterator

import pytest

from tests.processes import HANG


@pytest.fixture
def lighthouse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], str]]:
    """Starts a lighthouse that waits for a number of replicas, and gives its address."""
    from torchft.coordination import LighthouseServer

    monkeypatch.setenv("RUST_LOG", "warn")
    servers = []

    def start_one(replicas: int) -> str:
        servers.append(LighthouseServer(bind="127.0.0.1:0", min_replicas=replicas, join_timeout_ms=HANG * 1000))
        return f"http://127.0.0.1:{servers[-1].address().rpartition(':')[2]}"

    yield start_one
    for server in servers:
        server.shutdown()
