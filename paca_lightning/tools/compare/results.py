"""The results of a comparison: a table for each task in the terminal; CSV and JSON."""

import csv
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paca_lightning.core.files import replacing
from paca_lightning.tools.bench.measure import Timing
from paca_lightning.tools.compare.methods import FloorMethod
from paca_lightning.tools.compare.runs import MethodRuns, metric_of
from paca_lightning.tools.compare.trial import Result
from paca_lightning.tools.units import format_bytes

ACCURACY = re.compile(r"(^|[/_])acc(uracy)?$")
ALIKE = 0.03
"""Relative difference of trained parameters from the first method's above which a note names a method."""

Row = dict[str, Any]
Costs = dict[str, Timing]


def rows_of(runs: Sequence[MethodRuns], costs: Costs) -> list[Row]:
    """A row of figures for each method on one task. What is not known yet is None.

    Args:
        runs: Of each method on the task.
        costs: Time and memory of a step by the method's label; of the floor as ``floor``.
    """
    finished = [trial.result for one in runs for trial in one.reported]
    before = next((result["before"] for result in finished if result and result["before"]), None)
    accuracy = _accuracy_name([result for result in finished if result])
    return [_row(one, before, accuracy, costs) for one in runs]


def _row(one: MethodRuns, before: Result | None, accuracy: str | None, costs: Costs) -> Row:
    metric = one.plan.metric
    floor = isinstance(one.method, FloorMethod)
    results = [result for trial in one.reported if (result := trial.result) is not None]
    values = [metric_of(result, metric) for result in results]
    first = results[0] if results else {}
    cost, least = costs.get("floor" if floor else one.method.label), costs.get("floor")
    row: Row = {"task": one.task.name, "method": one.method.label, "lr": None if floor else one.lr}
    row |= {"edge": one.search.edge if one.search is not None and one.lr is not None else None}
    row |= {"metric": metric, **_statistics("value", [(before or {}).get(metric)] if floor else values)}
    row |= {
        "accuracy": accuracy,
        **_statistics("accuracy", [metric_of(r, accuracy) for r in results] if accuracy else []),
    }
    row |= {"runs": len(results), "diverged": sum(value is None for value in values)}
    row |= {"step_ms": None, "time_over_floor": None, "saved_bytes": None, "memory_over_floor": None, "noisy": None}
    if cost is not None and least is not None:
        row |= {"step_ms": cost.step_ms, "time_over_floor": cost.ratio_to_floor, "noisy": cost.noisy}
        row |= {"saved_bytes": cost.saved_bytes, "memory_over_floor": cost.saved_bytes / least.saved_bytes}
    names = ("trained_parameters", "adapter_bytes", "steps", "peak_bytes")
    return row | {name: 0 if floor and name in names[:2] else first.get(name) for name in names}


def _statistics(name: str, values: list[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation over the runs; None if one diverged or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {f"{name}_mean": None, f"{name}_sd": None}
    return {
        f"{name}_mean": statistics.fmean(known),
        f"{name}_sd": statistics.stdev(known) if len(known) > 1 else None,
    }


def _accuracy_name(results: list[Result]) -> str | None:
    """The metric that is an accuracy, by its name; the shortest of several."""
    names = {name for result in results for name in result["final"] if ACCURACY.search(name)}
    return min(names, key=lambda name: (len(name), name), default=None)


def print_table(rows: list[Row], runs: Sequence[MethodRuns], console: Console) -> None:
    """Print the table of a task, and what to know about it."""
    plan = runs[0].plan
    table = Table(title=f"{rows[0]['task']}: {plan.metric}", title_justify="left")
    table.add_column("method")
    accuracy = any(row["accuracy_mean"] is not None for row in rows)
    columns = ["lr", plan.metric, *(["accuracy"] if accuracy else []), "time", "memory", "trained", "adapter"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            "-" if row["lr"] is None else f"{row['lr']:g}",
            _mean(row, "value"),
            *([_mean(row, "accuracy")] if accuracy else []),
            *("-" if row[name] is None else f"{row[name]:.2f}" for name in ("time_over_floor", "memory_over_floor")),
            "-" if row["trained_parameters"] is None else f"{row['trained_parameters']:,}",
            "-" if row["adapter_bytes"] is None else format_bytes(row["adapter_bytes"]),
        )
    console.print(table)
    for note in notes(rows, runs):
        console.print(note, highlight=False, soft_wrap=True)


def _mean(row: Row, name: str) -> str:
    if row[f"{name}_mean"] is None:
        return f"diverged ({row['diverged']} of {row['runs']})" if name == "value" and row["diverged"] else "-"
    sd = row[f"{name}_sd"]
    return f"{row[f'{name}_mean']:.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def notes(rows: list[Row], runs: Sequence[MethodRuns]) -> list[str]:
    """What to know about a table: what its columns are, optima at edges, methods that train more or less."""
    plan = runs[0].plan
    over = f"mean ± standard deviation over {plan.seeds} seeds" if plan.seeds > 1 else "of one run"
    found = [
        f"{plan.metric}: {over}, each method at the best of its learning rates. time, memory: of a training step over "
        "the floor's, a frozen model's (memory: bytes saved for the backward)."
    ]
    for row, one in zip(rows, runs, strict=True):
        if row["edge"]:
            found.append(edge_note(one))
        if one.search is not None and one.search.finished and one.search.best is None:
            found.append(f"{row['method']}: every learning rate of {one.space} diverged. Give lower ones: lr=LOW:HIGH.")
    trained = [row for row in rows if row["trained_parameters"]]
    for row in trained[1:]:
        share = row["trained_parameters"] / trained[0]["trained_parameters"]
        if abs(share - 1) > ALIKE:
            found.append(f"{row['method']} trains {share:.3g} x as many parameters as {trained[0]['method']}.")
    if any(row["noisy"] for row in rows):
        found.append("The times are noisy: repeat on an idle machine before you rely on small differences.")
    return found


def edge_note(one: MethodRuns) -> str:
    """That the best learning rate lies at an edge of what was tried, and what to do."""
    assert one.search is not None
    best, tried = one.search.best, one.search.tried
    assert best is not None
    wide = one.plan.widen
    remedy = "The search was widened as far as it goes" if wide else "Widen the search (--widen), or give lr=LOW:HIGH"
    return (
        f"{one.method.label}: the best learning rate, {best.lr:g}, lies at the {one.search.edge} edge of those tried "
        f"({tried[0].lr:g} to {tried[-1].lr:g}), so a better one may lie beyond. {remedy}."
    )


def write_results(rows: list[Row], runs: Sequence[MethodRuns], setup: dict[str, Any], directory: Path) -> list[Path]:
    """Write ``compare.csv``, one row a method and task, and ``compare.json``, with all trials and curves.

    Args:
        rows: Of all tasks, in the order of ``runs``.
        runs: Of all methods on all tasks.
        setup: What was compared, on what, with which versions.
        directory: Where to; it exists.
    """
    with replacing(directory / "compare.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    detailed = [
        row
        | {
            "space": list(one.space),
            "search": _search(one),
            "seeds": [trial.summary for trial in one.reported if trial.result is not None],
        }
        for row, one in zip(rows, runs, strict=True)
    ]
    with replacing(directory / "compare.json") as temporary:
        temporary.write_text(json.dumps({"rows": detailed, "setup": setup}, indent=1) + "\n", encoding="utf-8")
    return [directory / "compare.csv", directory / "compare.json"]


def _search(one: MethodRuns) -> list[dict[str, float | None]]:
    """The trials of a search; None for a metric that was not finite."""
    if one.search is None:
        return []
    sign = -1 if one.plan.maximize else 1
    return [{"lr": lr, "value": sign * value if math.isfinite(value) else None} for lr, value in one.search.tried]
