"""The runs of one method on one task: the search for its learning rate, then one run for each seed."""

from dataclasses import dataclass
from pathlib import Path

from paca_lightning.tools.compare.methods import FloorMethod, Method
from paca_lightning.tools.compare.search import LearningRateSearch, Space
from paca_lightning.tools.compare.spaces import default_space
from paca_lightning.tools.compare.task import Task
from paca_lightning.tools.compare.trial import Result, Trial, make_trial

SEARCH_SEED = 0
"""Seed of the search. The reported runs have other seeds, so that none was chosen for its luck."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done with each method.

    Attributes:
        metric: What is compared.
        maximize: Whether larger is better.
        space: Learning rates to search; None: those that suit the method.
        trials: Trials of a search.
        widen: Whether a search goes on beyond an edge at which its best lies.
        seeds: How many runs are reported.
        steps: Optimizer steps of a reported run; None: as the config says.
        search_steps: The same for a trial of the search.
    """

    metric: str = "val/loss"
    maximize: bool = False
    space: Space | None = None
    trials: int = 7
    widen: bool = False
    seeds: int = 3
    steps: int | None = None
    search_steps: int | None = None


class MethodRuns:
    """Says which runs a method still needs, and keeps their results.

    Args:
        task: The run to compare on.
        method: What is trained.
        plan: What is done with each method.
        directory: Of the task.

    Raises:
        PaCAError: If a search needs Optuna, which is not installed.
    """

    def __init__(self, task: Task, method: Method, plan: Plan, directory: Path) -> None:
        self.task, self.method, self.plan = task, method, plan
        self._directory = directory
        self.space = method.space or plan.space or default_space(method, task)
        self.search: LearningRateSearch | None = None
        self._started: set[Path] = set()
        if not isinstance(method, FloorMethod) and self.space.low != self.space.high:
            # A study is of one setting of the run, whatever its label: the digest in the name tells.
            study = self._trial(1.0, SEARCH_SEED, searching=True).directory
            self.search = LearningRateSearch(
                directory / "searches.journal",
                f"{method.slug}/{study.name.rpartition('-')[2]}",
                self.space,
                plan.trials,
                widen=plan.widen,
                maximize=plan.maximize,
            )

    def _trial(self, lr: float, seed: int, *, searching: bool) -> Trial:
        steps = self.plan.search_steps or self.plan.steps if searching else self.plan.steps
        return make_trial(
            self.task,
            self.method,
            lr,
            seed,
            searching=searching,
            steps=steps,
            metric=self.plan.metric,
            parent=self._directory,
        )

    @property
    def lr(self) -> float | None:
        """The learning rate of the reported runs; None while it is searched, or if every one diverged."""
        if self.search is None:
            return self.space.low
        best = self.search.best
        return best.lr if best is not None and self.search.finished else None

    @property
    def reported(self) -> list[Trial]:
        """The runs that are reported, finished or not, once the learning rate is known."""
        if self.lr is None or isinstance(self.method, FloorMethod):
            return []
        seeds = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + self.plan.seeds)
        return [self._trial(self.lr, seed, searching=False) for seed in seeds]

    @property
    def remaining(self) -> int:
        """Runs that are not finished, as far as one can know."""
        if isinstance(self.method, FloorMethod):
            return 0
        if self.search is not None and not self.search.finished:
            return self.search.remaining + self.plan.seeds
        return sum(trial.result is None for trial in self.reported)

    def next(self) -> Trial | None:
        """The next run to start; None if that depends on runs that are not finished, or none is left."""
        while self.search is not None and (lr := self.search.ask()) is not None:
            trial = self._trial(lr, SEARCH_SEED, searching=True)
            if trial.result is None:
                return trial
            self.finish(trial)  # it ran to its end when an earlier command was stopped
        for trial in self.reported:
            if trial.directory not in self._started and trial.result is None:
                self._started.add(trial.directory)
                return trial
        return None

    def finish(self, trial: Trial) -> float | None:
        """Take the result of a run, and return its metric; None if it is not finite."""
        value = metric_of(trial.result, self.plan.metric)
        if trial.searching:
            assert self.search is not None
            self.search.tell(trial.lr, value)
        return value


def metric_of(result: Result | None, metric: str) -> float | None:
    """A metric after the last step of a run; None if it is not finite, or not there."""
    return None if result is None else result["final"].get(metric)
