"""The search for a learning rate, on functions whose best one is known."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from paca_lightning import PaCAError
from paca_lightning.tools.compare.search import LearningRateSearch, Space, parse_space, spread

SPACE = Space(1e-4, 1e-1)


def valley(bottom: float) -> Callable[[float], float | None]:
    """A loss with its lowest point at a learning rate, which diverges at 30 times that."""
    return lambda lr: None if lr > 30 * bottom else (math.log10(lr / bottom)) ** 2


def search(directory: Path, trials: int = 7, **settings: bool) -> LearningRateSearch:
    return LearningRateSearch(directory / "searches", "a study", SPACE, trials, **settings)


def run(found: LearningRateSearch, loss: Callable[[float], float | None], at_once: int = 1) -> list[float]:
    """The learning rates in the order in which they were asked for, several at a time."""
    asked: list[float] = []
    while rates := [rate for rate in (found.ask() for _ in range(at_once)) if rate is not None]:
        asked += rates
        for rate in rates:
            found.tell(rate, loss(rate))
    return asked


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("bottom", [4e-4, 3e-3, 2e-2])
def test_it_comes_near_the_best_with_few_trials(bottom: float, at_once: int, tmp_path: Path) -> None:
    found = search(tmp_path)
    assert len(run(found, valley(bottom), at_once)) == 7
    assert found.best is not None
    assert abs(math.log(found.best.lr / bottom)) < math.log(2)
    assert found.edge is None
    assert found.finished
    assert found.remaining == 0


def test_it_begins_with_rates_spread_over_the_space_and_its_ends(tmp_path: Path) -> None:
    assert spread(SPACE, 7) == [1e-4, 1e-3, 1e-2, 1e-1]
    assert run(search(tmp_path), valley(3e-3))[:4] == [1e-4, 1e-3, 1e-2, 1e-1]


@pytest.mark.parametrize(("bottom", "edge"), [(1e-6, "lower"), (1e3, "upper")])
def test_it_says_at_which_edge_the_best_lies(bottom: float, edge: str, tmp_path: Path) -> None:
    found = search(tmp_path)
    run(found, lambda lr: abs(math.log(lr / bottom)))
    assert found.edge == edge


def test_it_goes_on_beyond_an_edge_if_asked(tmp_path: Path) -> None:
    found = search(tmp_path, widen=True)
    asked = run(found, lambda lr: abs(math.log(lr / 0.5)))
    assert asked[4:6] == [0.4, 1.6]  # then the best lies between two, and the gaps beside it are halved
    assert len(asked) <= 7 + 3
    assert found.edge is None
    assert found.best is not None
    assert found.best.lr == pytest.approx(0.5, rel=0.3)


def test_it_does_not_go_beyond_an_edge_for_ever(tmp_path: Path) -> None:
    found = search(tmp_path, widen=True)
    assert max(run(found, lambda lr: -lr)) == pytest.approx(0.1 * 4**3)
    assert found.edge == "upper"


def test_larger_can_be_better(tmp_path: Path) -> None:
    found = search(tmp_path, maximize=True)
    run(found, lambda lr: None if lr > 0.05 else -((math.log10(lr / 3e-3)) ** 2))
    assert found.best is not None
    assert abs(math.log(found.best.lr / 3e-3)) < math.log(2)


def test_an_interrupted_search_goes_on_with_what_was_running(tmp_path: Path) -> None:
    whole = run(LearningRateSearch(tmp_path / "other", "a study", SPACE, 7), valley(3e-3))
    first = search(tmp_path)
    for _ in range(2):
        rate = first.ask()
        assert rate is not None
        first.tell(rate, valley(3e-3)(rate))
    running = first.ask()
    rest = run(search(tmp_path), valley(3e-3))
    assert rest == whole[2:]
    assert rest[0] == running


def test_nothing_is_best_if_all_diverged(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert len(run(found, lambda lr: None)) == len(spread(SPACE, 7))
    assert found.best is None
    assert found.finished


def test_studies_share_a_file_and_nothing_else(tmp_path: Path) -> None:
    run(search(tmp_path), valley(3e-3))
    other = LearningRateSearch(tmp_path / "searches", "another", SPACE, 7)
    assert other.tried == []


@pytest.mark.parametrize(
    ("text", "space"),
    [("auto", None), ("1e-3", Space(1e-3, 1e-3)), ("1e-4:1e-2", Space(1e-4, 1e-2)), ("0.5:0.5", Space(0.5, 0.5))],
)
def test_a_space_as_people_write_it(text: str, space: Space | None) -> None:
    assert parse_space(text, "--lr") == space


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1e-2:1e-4", "--lr='1e-2:1e-4' is reversed. Write the lower rate first: 1e-4:1e-2."),
        ("0:1e-4", "must be positive"),
        ("-1", "must be positive"),
        ("nan", "must be positive"),
        ("fast", "neither auto, nor a number"),
        ("1e-4:", "neither auto, nor a number"),
    ],
)
def test_a_space_that_is_none(text: str, complaint: str) -> None:
    with pytest.raises(PaCAError, match=complaint):
        parse_space(text, "--lr")


def test_without_optuna_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(PaCAError, match=r"pip install 'paca-lightning\[compare\]'"):
        search(tmp_path)
