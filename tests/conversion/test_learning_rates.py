"""What the summary says of a learning rate."""

import pytest

from paca_lightning import PaCAConfig, apply_paca
from paca_lightning.conversion.learning_rates import FAR, remark_on, suitable_step
from tests.tiny import tiny_llama

SMOLLM2 = 134_515_008


def test_models_of_known_sizes() -> None:
    assert [suitable_step(size) for size in (10**5, SMOLLM2, 8 * 10**9)] == [1e-2, 4e-3, 2e-3]


@pytest.mark.parametrize("step", [4e-3, 2e-3, 1e-2, 4e-3 / FAR, 4e-3 * FAR])
def test_a_usual_step_needs_no_remark(step: float) -> None:
    assert remark_on(step, SMOLLM2) is None


@pytest.mark.parametrize(("step", "where"), [(1e-6, "below"), (1e-4, "below"), (0.5, "above")])
def test_a_step_far_outside_is_named(step: float, where: str) -> None:
    assert f"far {where} what suits PaCA with Adam on a model of this size, about 0.004" in str(
        remark_on(step, SMOLLM2)
    )


@pytest.mark.parametrize(("adam", "lr", "remark"), [(True, 1e-6, True), (True, 1e-2, False), (False, 1e-6, False)])
def test_the_summary_names_it_for_adam_alone(adam: bool, lr: float, remark: bool) -> None:
    report = apply_paca(tiny_llama(), PaCAConfig(r=4))
    report.learning_rate, report.adam = lr, adam
    assert ("what suits PaCA" in " ".join(str(report).split())) == remark


def test_the_scaling_counts() -> None:
    report = apply_paca(tiny_llama(), PaCAConfig(r=4, alpha=4000))
    report.learning_rate, report.adam = 1e-2, True
    assert "far above" in " ".join(str(report).split())
