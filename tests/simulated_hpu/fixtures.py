"""The fixtures of every test on the simulated HPU: ``pytest_plugins = ["tests.simulated_hpu.fixtures"]``."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paca_lightning.strategies.hpu import bridge
from tests.simulated_hpu.build import build_extension
from tests.simulated_hpu.processes import Run, hpu_process


@pytest.fixture(scope="session")
def library() -> Path:
    """The compiled simulated HPU."""
    return build_extension()


@pytest.fixture(scope="session")
def hpu(library: Path) -> Iterator[Run]:
    """Runs a function where the simulated Gaudi software is installed: ``hpu(function, *args, **kwargs)``.

    PyTorch is told not to load that software by itself, so that it is seen when ``paca_lightning`` does.
    """
    with hpu_process(library, autoload=False) as run:
        assert not run(_bridge_is_imported), "importing paca_lightning must not import the Gaudi software"
        yield run


@pytest.fixture(scope="session")
def hpu_host(library: Path) -> Iterator[Run]:
    """The same on a host as it comes, where PyTorch loads the Gaudi software with itself.

    ``hpu_host(distributed_launch.launch, function, cards, *arguments)`` runs a function on several cards.
    """
    with hpu_process(library, autoload=True) as run:
        assert run(_bridge_is_imported)
        yield run


def _bridge_is_imported() -> bool:
    assert bridge.bridge_installed()
    return "habana_frameworks.torch" in sys.modules
