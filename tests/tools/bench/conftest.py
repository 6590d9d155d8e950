"""A tiny model, and a step on it."""

import pytest

from paca_lightning.tools.bench.workload import Workload
from tests.tiny import tiny_model_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model_directory(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def workload(model: str) -> Workload:
    return Workload(model=model, dtype="fp32", batch=2, tokens=16)
