"""Step times and saved bytes. How long steps take is not tested."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from paca_lightning.tools.bench.measure import WARM_UP, saved_bytes, time_methods
from paca_lightning.tools.bench.methods import Method
from paca_lightning.tools.bench.step_runner import StepRunner, StepTime
from paca_lightning.tools.bench.workload import Workload

LAYERS = 2
"""Of the tiny model."""


class Product(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(10, 10))

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        hidden = x @ self.weight  # saves x, which is there anyway, and the weight, which is a parameter
        dropped = (hidden.sin() * hidden.cos()).detach()  # what it saves is gone with it
        return SimpleNamespace(loss=(hidden * hidden[:5].sum() * dropped.max()).sum())  # hidden and two scalars


def test_saved_bytes_count_each_storage_once_if_it_outlives_the_forward() -> None:
    runner = StepRunner.__new__(StepRunner)
    runner.forward, runner.compiled = Product(), False
    runner.resident = list(runner.forward.parameters())
    loss = 1
    assert saved_bytes(runner, {"x": torch.ones(10, 10)}) == 4 * (100 + 2 + loss)


@pytest.mark.parametrize(("recompute", "random_states"), [(None, 0), ("selective", 2 * LAYERS)])
def test_saved_bytes_are_what_the_backward_frees(workload: Workload, recompute: str | None, random_states: int) -> None:
    """Also where what is kept does not pass through autograd's hooks."""
    runner = StepRunner(Method("paca", 4, recompute), workload.build(), workload)
    batch = workload.micro_batch(0)
    runner.step([batch])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = runner.forward(**batch).loss
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    held -= random_states * torch.get_rng_state().nbytes
    assert saved_bytes(runner, batch) == pytest.approx(held, rel=0.001)
    del loss


def test_paca_saves_r_channels_of_inputs_and_less_than_lora(workload: Workload) -> None:
    base, batch = workload.build(), workload.micro_batch(0)
    saved = {
        method.name: saved_bytes(StepRunner(method, base, workload), batch)
        for method in (Method("floor"), Method("paca", 4), Method("lora", 2))
    }
    channels = 4 * 7 * LAYERS * batch["input_ids"].numel() * 4
    assert saved["paca"] <= saved["floor"] + channels
    assert saved["lora"] > saved["paca"]


def test_checkpointing_saves_less(workload: Workload) -> None:
    workloads = [Workload(**(vars(workload) | {"checkpointing": how})) for how in (False, "selective", True)]
    saved = [saved_bytes(StepRunner(Method("paca", 4), one.build(), one), one.micro_batch(0)) for one in workloads]
    assert saved[2] < saved[1] < 0.9 * saved[0]
    assert saved[2] < 0.5 * saved[0]


def test_accumulation_averages_over_its_micro_batches(workload: Workload) -> None:
    base = workload.build()
    timings = time_methods(
        Workload(**(vars(workload) | {"accumulate": 3})), [Method("floor"), Method("paca", 4)], steps=2
    )
    assert timings[Method("paca", 4)].tokens_per_second == pytest.approx(
        3 * 2 * 16 / timings[Method("paca", 4)].step_ms * 1e3
    )
    # Three equal micro-batches are one: the same gradient, hence the same first update.
    once, thrice = (StepRunner(Method("full"), base, workload) for _ in range(2))
    once.step([workload.micro_batch(0)])
    thrice.step([workload.micro_batch(0)] * 3)
    batch = workload.micro_batch(1)
    assert thrice.forward(**batch).loss.item() == pytest.approx(once.forward(**batch).loss.item(), rel=1e-4)


def test_each_round_has_new_tokens_that_all_methods_share(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """With old ones, routers of a frozen model would repeat themselves, and find kernels for them ready."""
    seen: list[tuple[str, int]] = []
    step = StepRunner.step

    def noted(runner: StepRunner, micro_batches: list[dict[str, torch.Tensor]]) -> StepTime:
        seen.append((runner.method.label, hash(tuple(micro_batches[0]["input_ids"].flatten().tolist()))))
        return step(runner, micro_batches)

    monkeypatch.setattr(StepRunner, "step", noted)
    time_methods(workload, [Method("floor"), Method("paca", 4)], steps=2)
    tokens = {label: [text for name, text in seen if name == label] for label in ("floor", "paca r=4")}
    assert tokens["floor"] == tokens["paca r=4"]
    assert len(set(tokens["floor"])) == WARM_UP + 2


def test_the_floor_itself_is_what_all_are_compared_with(workload: Workload) -> None:
    methods = [Method("floor"), Method("paca", 4), Method("floor", recompute="blocks")]
    timings = time_methods(workload, methods, 3)
    assert timings[methods[0]].ratio_to_floor == 1
    assert timings[methods[2]].ratio_to_floor != 1


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_without_kernels")
def test_compiled_methods_compile_a_block_each_once(workload: Workload) -> None:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = Workload(**(vars(workload) | {"compile": True}))
    methods, said = [Method("floor"), Method("paca", 4), Method("lora", 2)], []
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        timings = time_methods(compiled, methods, steps=2, progress=said.append)
    # The first block of PaCA and LoRA differs from the others: nothing asks for its input's gradient.
    assert counters["stats"]["unique_graphs"] <= 2 * len(methods) - 1
    assert not counters["graph_break"]
    assert "paca r=4: compiling" in said
    eager = time_methods(workload, methods, steps=1)
    assert all(timings[method].saved_bytes <= eager[method].saved_bytes for method in methods)
