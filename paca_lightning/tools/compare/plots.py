"""Plots of a comparison: quality over the time of training, over memory, and over the size of the adapter."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from paca_lightning.core.files import replacing
from paca_lightning.tools.compare.results import Row
from paca_lightning.tools.compare.runs import MethodRuns

Curve = tuple[list[float], list[float]]


def plot(rows: list[Row], runs: Sequence[MethodRuns], path: Path) -> None:
    """Draw a task's methods in three panels: curves over the time, and a point a method over memory and size.

    Args:
        rows: Of the task.
        runs: Of its methods, in the same order.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = runs[0].plan.metric
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    over_time = figure.add_subplot(1, 3, 1, xlabel="seconds of training steps", ylabel=metric)
    panels = {
        "saved_bytes": figure.add_subplot(1, 3, 2, xlabel="saved for the backward, MiB", ylabel=metric),
        "adapter_bytes": figure.add_subplot(1, 3, 3, xlabel="adapter, MiB", ylabel=metric, xscale="log"),
    }
    for number, (row, one) in enumerate(zip(rows, runs, strict=True)):
        color = f"C{number}"
        seconds, values = curve(row, one)
        if seconds:
            over_time.plot(seconds, values, marker="o", markersize=3, color=color, label=row["method"])
        for name, axes in panels.items():
            if row[name] and row["value_mean"] is not None:
                point = (row[name] / 2**20, row["value_mean"])
                axes.errorbar(*point, yerr=row["value_sd"], fmt="o", color=color, capsize=3, label=row["method"])
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.suptitle(rows[0]["task"])
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def curve(row: Row, one: MethodRuns) -> Curve:
    """Seconds of training and the metric, the mean over the seeds at each validation that all of them have.

    The seconds are steps times the measured time of a step, if there is one: runs beside each other share the machine.
    """
    metric = one.plan.metric
    points: dict[int, list[tuple[float, float]]] = {}
    results = [result for trial in one.reported if (result := trial.result) is not None]
    for result in results:
        start = [{"step": 0, "seconds": 0.0, **result["before"]}] if result["before"] else []
        for point in [*start, *result["curve"]]:
            if point.get(metric) is not None:
                seconds = point["seconds"] if row["step_ms"] is None else point["step"] * row["step_ms"] / 1e3
                points.setdefault(point["step"], []).append((seconds, point[metric]))
    shared = [points[step] for step in sorted(points) if len(points[step]) == len(results)]
    means = [tuple(map(statistics.fmean, zip(*pairs, strict=True))) for pairs in shared]
    return [seconds for seconds, _ in means], [value for _, value in means]
