"""Results of base model and adapters beside each other: metrics with standard errors, and differences from the base."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Value:
    """A measured value.

    Attributes:
        value: The value.
        stderr: Its standard error; None if there is none.
    """

    value: float
    stderr: float | None

    def __str__(self) -> str:
        """With four digits."""
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")

    def signed(self) -> str:
        """The same with a sign, for differences."""
        return f"{'+' if self.value >= 0 else ''}{self}"


Results = dict[str, dict[str, Value]]
"""Values by task or group, and by metric."""


def values_of(results: dict[str, Any]) -> Results:
    """The values in lm-eval's results. Metrics are named as ``acc``, with a filter as ``exact_match (strict)``."""
    found: Results = {}
    for task, entries in results["results"].items():
        for metric, name, chosen in _metrics(entries):
            stderr = entries.get(f"{name}_stderr,{chosen}")
            found.setdefault(task, {})[metric] = Value(
                float(entries[f"{name},{chosen}"]), float(stderr) if isinstance(stderr, int | float) else None
            )
    return found


def differences(base: dict[str, Any], other: dict[str, Any]) -> Results:
    """By how much lm-eval's results of a model differ from those of the base model.

    Both answer the same questions, so the standard error is that of the questions' differences. Metrics that are no
    mean over questions have none.
    """
    before, after = values_of(base), values_of(other)
    found: Results = {}
    for task, entries in other["results"].items():
        for metric, name, chosen in _metrics(entries):
            value = after[task][metric].value - before[task][metric].value
            pairs = _pairs(base, other, task, name, chosen)
            deltas = [second - first for first, second in pairs]
            is_mean = len(deltas) > 1 and math.isclose(statistics.fmean(deltas), value, abs_tol=1e-9)
            stderr = statistics.stdev(deltas) / math.sqrt(len(deltas)) if is_mean else None
            found.setdefault(task, {})[metric] = Value(value, stderr)
    return found


def _metrics(entries: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Of a task: what a metric is called here, and lm-eval's names of metric and filter."""
    for key, value in entries.items():
        name, comma, chosen = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            yield (name if chosen == "none" else f"{name} ({chosen})"), name, chosen


def _pairs(
    base: dict[str, Any], other: dict[str, Any], task: str, name: str, chosen: str
) -> Iterator[tuple[float, float]]:
    """What both models got for each question; nothing for groups, and for metrics of many numbers."""

    def by_question(results: dict[str, Any]) -> dict[Any, float]:
        samples = [each for each in results["samples"].get(task, []) if each["filter"] == chosen]
        return {each["doc_id"]: each[name] for each in samples if isinstance(each.get(name), int | float)}

    first, second = by_question(base), by_question(other)
    return ((first[question], second[question]) for question in first.keys() & second.keys())


def table(values: dict[str, Results], changes: dict[str, Results]) -> Table:
    """A table: a row for each metric, a column for each model and for each difference from the base model.

    Args:
        values: By name of the model.
        changes: Differences by name of the adapter; empty if the base model was not measured.
    """
    shown = Table("task", "metric")
    for name in values:
        shown.add_column(escape(name), justify="right")
    for name in changes:
        shown.add_column("difference" if len(changes) == 1 else escape(f"{name} - base"), justify="right")
    for task, metrics in next(iter(values.values())).items():
        for metric in metrics:
            cells = [str(of[task][metric]) for of in values.values()]
            cells += [of[task][metric].signed() for of in changes.values()]
            shown.add_row(escape(task), escape(metric), *cells)
    return shown


def plain(results: Results) -> dict[str, Any]:
    """Results as JSON can hold them."""
    return {task: {metric: asdict(value) for metric, value in of.items()} for task, of in results.items()}
