"""Peak memory in a fresh process, of a model whose weights are read from files."""

import sys
from pathlib import Path

import pytest

from paca_lightning.tools.methods import Method
from paca_lightning.tools.peak import peak_bytes
from paca_lightning.tools.workload import Workload


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process' peak from /proc")
def test_a_map_of_the_models_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    preset = Workload(preset="small", layers=1, dtype="bf16")
    preset.build().save_pretrained(tmp_path)
    weights = sum(parameter.nbytes for parameter in preset.skeleton().parameters())
    workload = Workload(model=str(tmp_path), dtype="bf16", tokens=8)
    floor, paca = (peak_bytes(workload, method) for method in (Method("floor"), Method("paca", 4)))
    # PaCA has its own copies of the weights that it writes and shares the embeddings: still one model, and its columns.
    assert paca - floor < 0.25 * weights
