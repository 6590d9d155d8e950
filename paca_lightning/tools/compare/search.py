"""The search for a learning rate: an Optuna study whose trials are kept in a journal file."""

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paca_lightning.core.errors import PaCAError

if TYPE_CHECKING:
    import optuna

LR = "lr"
FEWEST = 3
"""Learning rates that are spread over the space before the search narrows."""

WIDENING = 4.0
"""Factor beyond the best learning rate at which a search tries once more if that one lies at an edge."""

MOST_WIDENINGS = 3


class Space(NamedTuple):
    """The learning rates to search, with both ends; one alone if they are equal."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


class Tried(NamedTuple):
    """A finished trial: its learning rate, and what it reached (the lower the better; infinite if it diverged)."""

    lr: float
    value: float


def parse_space(text: str, option: str) -> Space | None:
    """The space that a user gives: ``auto`` (None), a number such as ``1e-3``, or a range such as ``1e-4:1e-2``.

    Args:
        text: What the user gave.
        option: The option, for the message.

    Raises:
        PaCAError: If it is none of these, not positive, or reversed.
    """
    if text == "auto":
        return None
    low, colon, high = text.partition(":")
    try:
        space = Space(float(low), float(high if colon else low))
    except ValueError as error:
        raise PaCAError(f"{option}={text!r} is neither auto, nor a number (1e-3), nor a range (1e-4:1e-2).") from error
    if not all(0 < rate < math.inf for rate in space):
        raise PaCAError(f"{option}={text!r}: learning rates must be positive numbers.")
    if space.low > space.high:
        raise PaCAError(f"{option}={text!r} is reversed. Write the lower rate first: {high}:{low}.")
    return space


def between(low: float, high: float, share: float) -> float:
    """The learning rate at a share of the way between two, on a logarithmic scale, to three significant digits."""
    return float(f"{low * (high / low) ** share:.3g}")


def spread(space: Space, trials: int) -> list[float]:
    """The learning rates of the first half of the trials, at least :data:`FEWEST`: evenly spread, with both ends."""
    if space.low == space.high:
        return [space.low]
    count = max(FEWEST, math.ceil(trials / 2))
    return [between(*space, number / (count - 1)) for number in range(count)]


class LearningRateSearch:
    """Searches one learning rate on a logarithmic scale, several trials at a time.

    After the trials that are spread over the space, each further one halves the wider of the two gaps beside the best.
    If the best lies at an edge, the search can go on beyond it first.

    Args:
        journal: File that keeps the trials. A search that was interrupted goes on from there.
        study: Name of the study; several may share a file.
        space: What to search.
        trials: How many trials, before any beyond an edge.
        widen: Whether to go on beyond an edge, up to :data:`MOST_WIDENINGS` times.
        maximize: Whether the metric is the better the larger it is.

    Raises:
        PaCAError: If Optuna is not installed.
    """

    def __init__(
        self, journal: Path, study: str, space: Space, trials: int, *, widen: bool = False, maximize: bool = False
    ) -> None:
        self.space = space
        self._spread = spread(space, trials)
        self._trials = max(trials, len(self._spread)) if len(self._spread) > 1 else 1
        self._widen = widen
        self._sign = -1 if maximize else 1
        self._running: dict[float, int] = {}  # numbers in the study, by learning rate
        self._study = open_study(journal, study, maximize)

    @property
    def tried(self) -> list[Tried]:
        """All finished trials, in the order of their learning rates."""
        return sorted(
            Tried(trial.params[LR], self._sign * float(trial.value))
            for trial in self._study.trials
            if trial.value is not None
        )

    @property
    def best(self) -> Tried | None:
        """The best trial so far, if one has not diverged."""
        return min((one for one in self.tried if math.isfinite(one.value)), key=lambda one: one.value, default=None)

    @property
    def remaining(self) -> int:
        """Trials that are not finished, without those beyond an edge."""
        tried = [one.lr for one in self.tried]
        return max(len(self._running), self._allowed(tried) - len(tried))

    @property
    def finished(self) -> bool:
        """Whether no trial runs and none is left."""
        return not self._running and self._next() is None

    @property
    def edge(self) -> str | None:
        """``lower`` or ``upper`` if the best learning rate is the lowest or highest that was tried, in a search."""
        tried, best = self.tried, self.best
        if len(self._spread) == 1 or best is None:
            return None
        return "lower" if best.lr == tried[0].lr else "upper" if best.lr == tried[-1].lr else None

    def ask(self) -> float | None:
        """The learning rate to try next; None while that depends on running trials, and at the end."""
        if (rate := self._next()) is None:
            return None
        from optuna.distributions import FloatDistribution

        from paca_lightning.tools.compare.sampler import OneParameterSampler

        self._study.sampler = OneParameterSampler(lambda: rate)
        furthest = WIDENING ** (MOST_WIDENINGS + 1)
        asked = self._study.ask(
            {LR: FloatDistribution(self.space.low / furthest, self.space.high * furthest, log=True)}
        )
        self._running[rate] = asked.number
        return rate

    def tell(self, lr: float, value: float | None) -> None:
        """Take the result of a trial: the metric as the run logged it, or None if it is not finite."""
        failed = math.inf if self._sign == 1 else -math.inf
        self._study.tell(self._running.pop(lr), failed if value is None else value)

    def _next(self) -> float | None:
        finished = [one.lr for one in self.tried]
        taken = sorted({*finished, *self._running})
        for rate in self._spread:
            if rate not in taken:
                return rate
        if set(self._spread) - set(finished):
            return None  # the best of the spread trials is not known yet
        best = self.best
        if self._widen and (further := self._beyond(best)) is not None:
            return None if self._running else further
        if best is None or len(taken) >= self._allowed(taken):
            return None
        low, high = max((gap for gap in pairwise(taken) if best.lr in gap), key=lambda gap: gap[1] / gap[0])
        return between(low, high, 0.5)

    def _allowed(self, taken: list[float]) -> int:
        """How many trials there may be: one more for each widening."""
        beyond = [rate for rate in taken if not self.space.low <= rate <= self.space.high]
        return self._trials + min(len(beyond), MOST_WIDENINGS)

    def _beyond(self, best: Tried | None) -> float | None:
        """A learning rate beyond the edge at which the best one lies, unless that is too far."""
        edge = self.edge
        if best is None or edge is None:
            return None
        rate = between(best.lr, best.lr * (WIDENING if edge == "upper" else 1 / WIDENING), 1)
        limits = (1 / WIDENING**MOST_WIDENINGS, WIDENING**MOST_WIDENINGS)
        within = 0.99 * limits[0] * self.space.low <= rate <= 1.01 * limits[1] * self.space.high
        return rate if within else None


def open_study(journal: Path, name: str, maximize: bool) -> "optuna.Study":
    """The study of that name in a journal file, new or as it was left; what was running then has failed.

    Raises:
        PaCAError: If Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise PaCAError(
            "Searching a learning rate needs Optuna, which is not installed. Run: pip install "
            "'paca-lightning[compare]'. With one learning rate (--lr 1e-3) nothing is searched."
        ) from error
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(
        storage=storage, study_name=name, direction="maximize" if maximize else "minimize", load_if_exists=True
    )
    for trial in study.trials:
        if not trial.state.is_finished():
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study
