"""Peak memory is that of training alone."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
from torch import nn

from paca_lightning.tools.bench import peak
from paca_lightning.tools.bench.methods import Method
from paca_lightning.tools.bench.peak import longest_sequence, peak_bytes
from paca_lightning.tools.bench.step_runner import StepRunner
from paca_lightning.tools.bench.workload import Workload
from tests.tiny import tiny_model_directory


@pytest.mark.skipif(sys.platform != "linux", reason="resets a process' peak through /proc")
def test_the_base_of_a_method_with_copies_is_gone_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, alive = [], []
    build = Workload.build

    def remembered(workload: Workload) -> nn.Module:
        model = build(workload)
        bases.append(weakref.ref(model.model.layers[0].mlp.up_proj.weight.untyped_storage()))
        return model

    monkeypatch.setattr(Workload, "build", remembered)
    monkeypatch.setattr(StepRunner, "step", lambda *_: alive.append(bases[0]() is not None))
    gc.disable()  # otherwise chance decides
    try:
        workload = Workload(model=str(tiny_model_directory(tmp_path / "tiny")), tokens=8)
        peak.train_from_reset_peak(workload, Method("paca", 4))
    finally:
        gc.enable()
    assert alive == [False] * peak.STEPS


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process' peak from /proc")
def test_peak_memory_grows_by_what_a_method_adds() -> None:
    workload = Workload(preset="small", layers=1, dtype="fp32", tokens=8)
    weights = sum(4 * parameter.numel() for parameter in workload.skeleton().parameters())
    floor = peak_bytes(workload, Method("floor"))
    full = peak_bytes(workload, Method("full"))
    # Pages of libraries come and go with the machine's memory, hence the margins.
    assert 0.9 * weights < floor < 1.6 * weights
    assert full - floor == pytest.approx(3 * weights, rel=0.2)  # gradients and two moments


def test_the_longest_sequence_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch, workload: Workload) -> None:
    tried = []

    def peak(workload: Workload, method: Method, budget: float) -> float:
        tried.append(workload.tokens)
        return 1000 * workload.tokens

    monkeypatch.setattr("paca_lightning.tools.bench.peak.peak_bytes", peak)
    assert longest_sequence(workload, Method("floor"), "1000kB") == 960
    assert len(tried) < 12
    assert longest_sequence(workload, Method("floor"), "63kB") == 0
