"""Tests on a CUDA device. Without one they are skipped; ``PACA_GPU_TESTS=cpu`` runs those that a CPU can run.

That shows that the tests themselves are right before a GPU is at hand. It says nothing of a GPU.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ON_CPU = os.environ.get("PACA_GPU_TESTS") == "cpu"
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip those that this machine cannot run."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        needs_cuda = not ON_CPU or item.get_closest_marker("cuda_only")
        if needs_cuda and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> str:
    """Where to compute."""
    return "cpu" if ON_CPU else "cuda"


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Products of fp32 in fp32, so that a reference in fp64 is matched."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
