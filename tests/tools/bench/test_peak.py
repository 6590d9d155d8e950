"""Peak memory is that of training alone."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
from torch import nn

from paca_lightning.tools.bench import peak
from paca_lightning.tools.bench.methods import Method
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
