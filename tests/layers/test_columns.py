"""Columns are chosen by the seed and the layer's path, or by scores: nothing else."""

import pytest
import torch

from paca_lightning import PaCAError
from paca_lightning.layers.columns import check_indices, largest_indices, random_indices

DRAWN = [1, 6, 23, 29]


def test_the_draw_is_the_same_everywhere() -> None:
    # Literal on purpose: another machine, rank or version of this package must draw the same columns.
    assert random_indices(32, 4, seed=0, path="model.layers.0.self_attn.q_proj").tolist() == DRAWN
    torch.manual_seed(123)
    torch.rand(7)
    state = torch.get_rng_state()
    assert random_indices(32, 4, seed=0, path="model.layers.0.self_attn.q_proj").tolist() == DRAWN
    assert torch.equal(torch.get_rng_state(), state)  # and the global random state is left alone


def test_the_draw_ignores_the_default_device() -> None:
    with torch.device("meta"):
        assert random_indices(32, 4, seed=0, path="model.layers.0.self_attn.q_proj").tolist() == DRAWN


def test_another_seed_or_path_draws_other_columns() -> None:
    draws = {(s, p): tuple(random_indices(1000, 8, seed=s, path=p).tolist()) for s in (0, 1, -1) for p in ("a", "b")}
    assert len(set(draws.values())) == 6


def test_a_draw_is_sorted_and_unique_and_may_take_every_column() -> None:
    assert random_indices(16, 16, seed=3, path="x").tolist() == list(range(16))
    drawn = random_indices(1000, 100, seed=3, path="x")
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == 100


def test_every_column_is_as_likely_as_another() -> None:
    counts = torch.zeros(20)
    for layer in range(2000):
        counts[random_indices(20, 5, seed=0, path=f"layers.{layer}")] += 1
    assert (counts - 500).abs().max() < 100  # 5 standard deviations of a binomial with p = 1/4


def test_the_largest_scores_win_and_of_equal_ones_the_earlier_column() -> None:
    assert largest_indices(torch.tensor([0.1, 5.0, 3.0, 5.0, 3.0]), 3).tolist() == [1, 2, 3]
    assert largest_indices(torch.ones(100), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("indices", "problem"),
    [
        ([1, 2, 8], "reach from 1 to 8, outside the 8 input columns"),
        ([-1, 2, 3], "reach from -1 to 3, outside the 8 input columns"),
        ([3, 2, 4], "are not sorted and unique"),
        ([2, 2, 4], "are not sorted and unique"),
        ([2, 4], r"have shape \(2,\), not \(3,\)"),
        ([[1, 2, 3]], r"have shape \(1, 3\), not \(3,\)"),
        ([1.0, 2.0, 3.0], "are torch.float32, not torch.int64"),
    ],
)
def test_unusable_indices_are_refused_by_layer(indices: list[float], problem: str) -> None:
    with pytest.raises(PaCAError, match=rf"^The column indices of 'mlp\.up_proj' {problem}"):
        check_indices(torch.tensor(indices), 8, 3, path="mlp.up_proj")


def test_usable_indices_pass() -> None:
    check_indices(torch.tensor([0, 3, 7]), 8, 3, path="x")
    check_indices(torch.tensor([7]), 8, 1, path="x")
