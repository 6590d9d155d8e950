"""Runs what a comparison still needs, and shows how far it is."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.compare.pool import TrialPool
from paca_lightning.tools.compare.runs import MethodRuns
from paca_lightning.tools.compare.trial import Trial


def run_all(runs: Sequence[MethodRuns], jobs: int, metric: str, minutes: float | None = None) -> bool:
    """Run everything that methods need, several trials at a time.

    Args:
        runs: Of each method on each task.
        jobs: How many trials run at a time.
        metric: What is compared.
        minutes: After this time no trial starts any more.

    Returns:
        Whether everything is finished.

    Raises:
        PaCAError: If a trial fails, or two that must be alike were trained on other rows.
    """
    began = time.monotonic()
    rows = _Rows()
    for one in runs:
        for trial in one.reported:
            rows.check(trial)
    with TrialPool(jobs, metric) as pool, _Display(jobs) as display:
        owners: dict[int, MethodRuns] = {}
        while True:
            late = minutes is not None and time.monotonic() - began > 60 * minutes
            for one in () if late else runs:
                while pool.has_room and (started := one.next()) is not None:
                    owners[id(started)] = one
                    pool.start(started)
            display.show(sum(one.remaining for one in runs), [running.trial.label for running in pool.running])
            if not pool.running:
                return not any(one.remaining for one in runs)
            ended = pool.wait()
            rows.check(ended.trial)
            owner = owners.pop(id(ended.trial))
            value = owner.finish(ended.trial)
            reached = "diverged" if value is None else f"{metric} {value:.4f}"
            remaining = sum(one.remaining for one in runs)
            seconds = time.monotonic() - ended.started
            display.tell(f"{owner.task.name}: {ended.trial.label}: {reached}", seconds, remaining)


class _Rows:
    """Checks that trials with the same steps and seed train on the same rows in the same order."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[int, Trial]] = {}

    def check(self, trial: Trial) -> None:
        result = trial.result
        if result is None:
            return
        group = (trial.directory.parents[1], result["steps"], trial.seed)
        checksum, other = self._known.setdefault(group, (result["rows_checksum"], trial))
        if checksum != result["rows_checksum"]:
            raise PaCAError(
                f"{trial.label} was not trained on the rows of {other.label} in the same order, so the two cannot be "
                "compared. The data module must give the same batches for the same seed."
            )


class _Display:
    """A bar of finished runs with the labels of those that run, and a line for each that ends."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._seconds: list[float] = []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[running]}"),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._bar = self._progress.add_task("runs", total=None, running="")

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, remaining: int, running: list[str]) -> None:
        """Show what runs, and how much remains."""
        done = len(self._seconds)
        self._progress.update(self._bar, completed=done, total=done + remaining, running="; ".join(running))

    def tell(self, what: str, seconds: float, remaining: int) -> None:
        """Print how a run ended, and about how long the others take."""
        self._seconds.append(seconds)
        left = remaining * sum(self._seconds) / len(self._seconds) / self._jobs
        more = f"{remaining} more, about {_duration(left)}" if remaining else "the last one"
        self._progress.console.print(f"{what} ({_duration(seconds)}; {more})", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
