"""Training sharded over simulated HPUs equals training on one CPU, and resumes from its checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paca_lightning import PaCAConfig
from paca_lightning.strategies import HPUFSDP2Strategy
from tests.distributed_launch import launch
from tests.distributed_training import Run as Job
from tests.distributed_training import assert_equal_runs, train
from tests.simulated_hpu.processes import Run

pytest_plugins = ["tests.simulated_hpu.fixtures"]
pytestmark = pytest.mark.distributed

NF4 = PaCAConfig(r=4, alpha=8, quantize="nf4")
JOBS = {
    "dense": Job(strategy={}),
    "NF4": Job(strategy={}, config=NF4),
    "two copies of two shards": Job(strategy={"shard_size": 2}),
    "bf16-mixed": Job(strategy={}, trainer={"precision": "bf16-mixed"}),
    "NF4, bf16-mixed": Job(strategy={}, config=NF4, trainer={"precision": "bf16-mixed"}),
}
SAVED = {
    "dense": Job(strategy={}, module={"by_step": True}),
    "NF4": Job(strategy={}, config=NF4, module={"by_step": True}),
    "one file": Job(strategy={"save_distributed_checkpoint": False}, module={"by_step": True}),
}


def train_on_cards(jobs: dict[str, Job]) -> dict[str, dict[str, Any]]:
    """Train several jobs in order on the cards of this launch. Returns losses and whole deltas."""
    results = {}
    for name, job in jobs.items():
        assert job.strategy is not None
        settings = job.trainer | {"accelerator": "hpu", "strategy": HPUFSDP2Strategy(**job.strategy)}
        result = train(replace(job, trainer=settings))
        results[name] = result | {"deltas": {path: delta.cpu() for path, delta in result["deltas"].items()}}
    return results


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    return {name: directory / f"{name}.ckpt" for name in SAVED}


@pytest.fixture(scope="module")
def four_cards(hpu_host: Run, checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Complete jobs, and jobs that are saved after 5 of 10 steps and resumed, in one launch."""
    jobs = dict(JOBS)
    for name, job in SAVED.items():
        jobs[f"first half, {name}"] = replace(job, steps=5, save=checkpoints[name])
        jobs[f"second half, {name}"] = replace(job, resume=checkpoints[name])
        jobs[f"straight, {name}"] = job
    results: dict[str, dict[str, Any]] = hpu_host(launch, train_on_cards, 4, jobs)[0]
    return results


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if not job.trainer])
def test_four_cards_equal_one_cpu(four_cards: dict[str, Any], name: str) -> None:
    assert_equal_runs(four_cards[name], train(replace(JOBS[name], strategy=None)))


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job.trainer])
def test_four_cards_train_in_mixed_precision_as_one_cpu(four_cards: dict[str, Any], name: str) -> None:
    one = train(replace(JOBS[name], strategy=None))
    # Autocast has its own operator lists for CPUs, so it rounds at other places.
    assert four_cards[name]["losses"] == pytest.approx(one["losses"], rel=1e-2)
    assert four_cards[name]["losses"] != four_cards[name.removesuffix("bf16-mixed").rstrip(", ") or "dense"]["losses"]


@pytest.mark.parametrize("name", SAVED)
def test_a_resumed_run_on_four_cards_equals_an_uninterrupted_one(four_cards: dict[str, Any], name: str) -> None:
    first, second, straight = (four_cards[f"{part}, {name}"] for part in ("first half", "second half", "straight"))
    assert first["losses"] + second["losses"] == straight["losses"]
    for path, delta in straight["deltas"].items():
        assert torch.equal(second["deltas"][path], delta)


def test_two_cards_resume_runs_of_four(hpu_host: Run, four_cards: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    jobs = {name: replace(SAVED[name], resume=checkpoints[name]) for name in ("dense", "NF4")}
    for name, resumed in hpu_host(launch, train_on_cards, 2, jobs)[0].items():
        straight = four_cards[f"straight, {name}"]
        assert_equal_runs(resumed, straight | {"losses": straight["losses"][5:]})


def test_a_cpu_resumes_a_run_of_four_cards(four_cards: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    resumed = train(replace(SAVED["one file"], strategy=None, resume=checkpoints["one file"]))
    straight = four_cards["straight, one file"]
    assert_equal_runs(resumed, straight | {"losses": straight["losses"][5:]})
