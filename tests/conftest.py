"""What every test leaves behind is taken away: the environment of a launched run, and its process group."""

import functools
import os
from collections.abc import Iterator
from typing import Any

# Before torch and huggingface_hub are imported.
os.environ |= {
    # Several workers share the machine, and one thread rounds sums alike wherever it runs.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # No test reaches for the network.
    "HF_HUB_OFFLINE": "1",
    # torch.compile: no pool of compilers that each import torch, and code that is fast to compile, not to run.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_DEBUG_COMPILE": "1",
}

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import, which must not be one test's)
import pytest
import torch
import torch.distributed as dist

from tests.distributed_launch import start_server

# Tests that share costly processes stay on one worker: those of a module, or of a folder. Any other test goes where a
# worker is free.
TOGETHER = (
    "tests/adapters/test_export_sharded.py",
    "tests/adapters/test_sharded_checkpoint.py",
    "tests/strategies/fsdp2/test_sharding.py",
    "tests/strategies/fsdp2/test_strategy.py",
    "tests/strategies/fsdp2/test_streaming.py",
    "tests/strategies/hpu/",
    "tests/test_callback_fragments.py",
    "tests/tools/compare/test_command.py",
    "tests/tools/memory/test_traced_model.py",
)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests on simulated HPUs: the device is in a process of its own."""
    for item in items:
        if {"library", "hpu", "hpu_host"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(autouse=True)
def server_of_ranks(request: pytest.FixtureRequest) -> None:
    """The package's benchmark uses the same server, and would start it with less imported."""
    if request.node.get_closest_marker("distributed"):
        start_server()


@pytest.fixture
def compiled_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` traces and partitions as ever, but builds no C++ kernels, which takes a minute."""
    compile_to = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compile_to)


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    """Lightning's launchers leave LOCAL_RANK and the like, which a later run would take for its own."""
    before = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    yield
    for name in [name for name in os.environ if not name.startswith("PYTEST_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
