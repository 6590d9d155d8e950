"""The memory tracer against PyTorch's own, operator by operator in the same steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.distributed._tools.mem_tracker import MemTracker

from paca_lightning import PaCAConfig
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.tasks import CausalLMModule
from paca_lightning.tools.memory import traced_step
from paca_lightning.tools.memory.baselines import FLOOR, FULL, LORA, PACA
from paca_lightning.tools.memory.timeline import Kind
from paca_lightning.tools.memory.traced_model import TracedModel
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.memory.tracing import MemoryTracer
from tests.tiny import tiny_config


class TorchTracker(MemTracker):
    """Without its hooks on modules, which say what memory is for and refuse frozen parameters and micro-batches."""

    def _ignore(self, *args: Any) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore  # type: ignore[assignment]


class BothTracers(MemoryTracer):
    """Ours, and PyTorch's on top of it: both see the same operators of the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.torchs = TorchTracker()

    def hold(self, tensors: Any, kind: Kind) -> None:
        tensors = list(tensors)
        self.torchs.track_external(*tensors)
        super().hold(tensors, kind)

    def __enter__(self) -> "BothTracers":
        super().__enter__()
        self.torchs._orig_resize = UntypedStorage.resize_  # ours, which calls PyTorch's
        self.torchs.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.torchs.__exit__(*args)
        super().__exit__(*args)


@pytest.mark.parametrize(
    ("baseline", "config", "settings"),
    [
        (PACA, {}, {}),
        (PACA, {}, {"accumulate": 4}),
        (PACA, {}, {"precision": "bf16-mixed"}),
        (PACA, {}, {"gradient_buckets": True}),
        (PACA, {"quantize": "nf4"}, {}),
        (FULL, {}, {}),
        (LORA, {}, {}),
        (FLOOR, {}, {}),
        (PACA, {}, {"strategy": FSDP2Strategy(activation_checkpointing=True), "ranks": 4}),
        (PACA, {}, {"strategy": FSDP2Strategy(), "ranks": 4, "shard_size": 2, "accumulate": 2}),
        (PACA, {"quantize": "nf4"}, {"strategy": FSDP2Strategy(), "ranks": 2}),
    ],
    ids=lambda value: getattr(value, "name", None) or "-".join(value) or "plain",
)
def test_our_peak_is_that_of_pytorchs_tracker_to_the_byte(
    baseline: Any, config: dict[str, Any], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracers: list[BothTracers] = []

    def both() -> BothTracers:
        tracers.append(BothTracers())
        return tracers[-1]

    monkeypatch.setattr(traced_step, "MemoryTracer", both)
    tiny_config().save_pretrained(tmp_path)
    module = CausalLMModule(str(tmp_path), pretrained=False, dtype="float32")
    converter = baseline.converter(PaCAConfig(r=8, **config))
    run = TracedRun(module=module, convert=converter, batch_size=2, tokens=64, **settings)
    ours = TracedModel(run).step(whole=True)

    (tracer,) = tracers
    theirs = tracer.torchs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert ours.peak == theirs > 0


@pytest.mark.filterwarnings("ignore:global module forward hook")  # of the tracker, when it fails
def test_pytorchs_tracker_still_refuses_what_a_fine_tuning_step_has() -> None:
    """Its limits, for which we have a tracer of our own (docs/decisions/0013). If this fails, look at it again."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    def step(steps: int) -> Tensor:
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            for _ in range(steps):
                model(torch.ones(1, 4)).sum().backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    assert step(1) > 0
    with pytest.raises(NotImplementedError, match="multiple iterative calls"):
        step(2)
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="cannot register a hook on a tensor that doesn't require gradient"):
        step(1)
