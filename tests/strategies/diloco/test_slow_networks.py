"""Replicas simulated in one process have the bits of replicas that exchange over TCP, and count the same bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchft")

from paca_lightning.strategies.diloco.settings import Outer
from scripts.simulated_replicas import Cluster, ring_bytes
from scripts.slow_networks import ARMS, outer_of, plot, seconds_to, tables
from tests.artefacts import PNG
from tests.strategies.diloco.test_compression import SHAPES, moves, pytestmark, same_bits, together  # noqa: F401

STEPS = 6


def simulated(replicas: int) -> Cluster:
    """Replicas that take the steps of those in ``together``."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]

    def gradients(replica: int, step: int) -> None:
        for parameter, move in zip(parameters, moves(replica, step + 1)[-1], strict=True):
            parameter.grad = move

    def optimizer() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        inner = torch.optim.SGD(parameters, lr=1.0)
        return inner, torch.optim.lr_scheduler.ConstantLR(inner, 1.0)

    return Cluster(parameters, gradients, optimizer, replicas)


@pytest.mark.parametrize("name", ["none", "bf16", "int8", "top_k"])
@pytest.mark.parametrize("replicas", [2, 4])
def test_simulated_replicas_have_the_bits_and_bytes_of_real_ones(
    replicas: int, name: str, lighthouse: Callable[[int], str]
) -> None:
    outer = Outer(sync_every=2, compression=name, top_k=0.05)  # type: ignore[arg-type]
    (real, _, real_bytes), *others = together(replicas, lighthouse(replicas), outer, range(STEPS))
    assert all(same_bits(real, other) for other, _, _ in others)
    cluster = simulated(replicas)
    for again in range(2):  # the second time with the first round remembered
        *_, (steps, sent) = cluster.diloco(outer, STEPS)
        assert steps == STEPS
        if name == "none" and replicas > 2:  # Gloo adds four numbers in another order
            torch.testing.assert_close(real, [each.detach() for each in cluster.parameters], rtol=1e-5, atol=1e-6)
        else:
            assert same_bits(real, cluster.parameters), again
    assert abs(sent - real_bytes) <= len(SHAPES) * STEPS  # a ring's share of each tensor is rounded
    assert sent > 0


def test_ddp_is_the_mean_of_gradients() -> None:
    cluster = simulated(2)
    *_, (steps, sent) = cluster.ddp(3)
    expected = [-sum((a + b) / 2 for a, b in zip(*gradients, strict=True)) for gradients in steps_of_both(3)]
    for parameter, moved in zip(cluster.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), moved, rtol=1e-5, atol=1e-6)
    assert (steps, sent) == (3, 3 * 4 * sum(parameter.numel() for parameter in cluster.parameters))


def steps_of_both(steps: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """By parameter, the gradients of both replicas along the steps."""
    first, second = moves(0, steps), moves(1, steps)
    return [([each[n] for each in first], [each[n] for each in second]) for n in range(len(SHAPES))]


def test_time_to_a_loss_is_steps_and_bytes() -> None:
    points = [{"step": 10, "bytes": 1_000_000, "loss": 3.0}, {"step": 20, "bytes": 2_000_000, "loss": 1.0}]
    assert seconds_to(points, 3.0, 0.5, 10) == pytest.approx(5 + 0.8)
    assert seconds_to(points, 2.0, 0.5, 10) == pytest.approx(7.5 + 1.2)
    assert seconds_to(points, 0.9, 0.5, 10) is None
    assert ring_bytes(100, 4) == 150


@pytest.mark.parametrize(
    ("arm", "outer"),
    [
        ("ddp", None),
        ("H=100 int8", Outer(100, compression="int8")),
        ("H=20 none, lr 1, momentum 0.5", Outer(20, lr=1.0, momentum=0.5)),
    ],
)
def test_arms_name_their_outer_loop(arm: str, outer: Outer | None) -> None:
    assert outer_of(arm) == outer
    with pytest.raises(ValueError, match="is no arm"):
        outer_of(f"{arm}, momentum")
    for each in ARMS:
        outer_of(each)


def test_table_and_plot_compare_with_ddp(tmp_path: Path) -> None:
    points = [{"step": step, "bytes": 1_000_000 * step, "loss": 3 - step / 50} for step in (50, 100)]
    trained = {name: points if outer_of(name) is None else [points[-1] | {"bytes": 500_000}] for name in ARMS[:6]}
    results = {"step_seconds": 0.5, "full": 1000, "lora": 10, "2": trained}
    head, _, ddp, *others = tables(results, 2).splitlines()
    assert "s to 1.020 at 100 Mbit/s" in head
    assert [cell.strip() for cell in ddp.split("|")[1:6]] == ["ddp", "1.0000", "+0.00%", "100.00", "1"]
    assert len(others) == 5 + 2
    assert all(cell in others[0] for cell in ("| H=100 none |", "| 0.50 | 200 | 1.008 | 1.001 |", "| 50 | 50 | 50 |"))
    plot(results, [2], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
