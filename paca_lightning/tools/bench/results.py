"""The results of a benchmark: tables in the terminal; JSON, CSV and a plot in a directory."""

import csv
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paca_lightning.core.files import check_writable, written_aside
from paca_lightning.tools.units import format_bytes

Row = dict[str, Any]


def label(row: Row) -> str:
    """Method and rank of a row, such as ``paca r=16``."""
    return row["method"] if row["r"] is None else f"{row['method']} r={row['r']}"


def print_table(rows: list[Row], title: str, console: Console | None = None) -> None:
    """Print a benchmark's rows as two tables, time and memory.

    Args:
        rows: As in ``bench.json``.
        title: What was measured.
        console: Where to print. Default: standard output.
    """
    time = _table(title, "step ms", "x floor", "quartiles", "fwd ms", "bwd ms", "opt ms")
    longest = any("max_tokens" in row for row in rows)
    memory = _table("", "saved", "peak", "trainable", "tokens/s", *(["longest"] if longest else []))
    for row in rows:
        low, high = row["ratio_quartiles"]
        other_floor = f" ({row['floor']})" if row["floor"] != "floor" else ""
        time.add_row(
            label(row),
            f"{row['step_ms']:.1f}",
            f"{row['ratio_to_floor']:.3f}{other_floor}{' noisy' if row['noisy'] else ''}",
            f"{low:.3f}-{high:.3f}",
            *(f"{row[name]:.1f}" for name in ("forward_ms", "backward_ms", "optimizer_ms")),
        )
        memory.add_row(
            label(row),
            format_bytes(row["saved_bytes"]),
            "-" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
            f"{row['trainable_parameters']:,}",
            f"{row['tokens_per_second']:.0f}",
            *([f"{row['max_tokens']} tokens"] if longest else []),
        )
    console = console or Console()
    console.print(time)
    console.print(memory)
    if any(row["noisy"] for row in rows):
        console.print(
            "noisy: half of the steps differ by more than 5% in their ratio to the floor. Repeat on an idle machine or "
            "with more --steps before you rely on small differences."
        )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def open_output(directory: str) -> Path:
    """The directory for the results, created if it is missing; call this before anything is measured.

    Args:
        directory: As the user gave it.

    Raises:
        PaCAError: If it cannot be written.
    """
    check_writable(directory, "--output")
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_results(rows: list[Row], setup: dict[str, Any], directory: Path) -> list[Path]:
    """Write ``bench.json``, ``bench.csv`` and ``bench.png``.

    Args:
        rows: One dictionary of figures for each method.
        setup: What was measured, on what, with which versions.
        directory: Where to; it exists.

    Returns:
        The paths of the three files.
    """
    paths = [directory / f"bench.{suffix}" for suffix in ("json", "csv", "png")]
    with written_aside(directory) as scratch:
        aside = [scratch / path.name for path in paths]
        aside[0].write_text(json.dumps({"rows": rows, "setup": setup}, indent=2) + "\n", encoding="utf-8")
        with aside[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, setup["title"], aside[2])
    return paths


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw step times, saved bytes and, if all were measured, peaks as bars.

    Args:
        rows: As in ``bench.json``.
        title: What was measured.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [label(row) for row in rows]
    ratios = [row["ratio_to_floor"] for row in rows]
    # A median lies between its quartiles, so no bar is negative.
    bars = [
        [ratio - row["ratio_quartiles"][0] for ratio, row in zip(ratios, rows, strict=True)],
        [row["ratio_quartiles"][1] - ratio for ratio, row in zip(ratios, rows, strict=True)],
    ]
    panels = [("step time, x floor", ratios, bars), ("saved for backward, MiB", _mebibytes(rows, "saved_bytes"), None)]
    if all(row["peak_bytes"] is not None for row in rows):
        panels.append(("peak memory, MiB", _mebibytes(rows, "peak_bytes"), None))
    figure = Figure(figsize=(4.2 * len(panels), 1.2 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (name, values, errors) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), position)
        colors = ["#999999" if one == "floor" else "#4477aa" for one in labels]
        drawn = axes.barh(labels, values, xerr=errors, color=colors)
        axes.bar_label(drawn, fmt="%.2f" if errors else "%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def _mebibytes(rows: list[Row], name: str) -> list[float]:
    return [row[name] / 2**20 for row in rows]
