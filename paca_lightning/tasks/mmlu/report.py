"""Reports an evaluation as a rich table, CSV and JSON."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from paca_lightning.core.files import written_aside
from paca_lightning.tasks.mmlu.accuracy import Score
from paca_lightning.tasks.mmlu.prompts import Method

Results = Mapping[Method, Sequence[Score]]


def result_table(title: str, results: Results, baseline: Results | None = None, *, subjects: bool = True) -> Table:
    """A table of accuracies in percent with their confidence intervals, one column for each method.

    Args:
        title: Title of the table.
        results: Scores by method; all methods have the same groups.
        baseline: Earlier results, shown beside.
        subjects: Whether to list the subjects too.
    """
    table = Table(title=title)
    table.add_column("")
    table.add_column("questions", justify="right")
    for method in results:
        table.add_column(f"by {method}", justify="right")
        if baseline is not None:
            table.add_column("before", justify="right")
    level = None
    for position, score in enumerate(next(iter(results.values()))):
        if score.level == "subject" and not subjects:
            break
        if level not in (None, score.level):
            table.add_section()
        level = score.level
        cells = [score.name.replace("_", " "), f"{score.questions:,}"]
        for method, scores in results.items():
            cells.append(_percent(scores[position]))
            if baseline is not None:
                cells.append(f"{baseline[method][position].accuracy:.1%}")
        table.add_row(*cells)
    return table


def _percent(score: Score) -> str:
    return f"{score.accuracy:.1%} ({score.low:.0%}-{score.high:.0%})"


def write_results(directory: Path, name: str, results: Results, about: Mapping[str, Any]) -> None:
    """Write ``<name>.json`` and ``<name>.csv`` to a directory; each appears complete or not at all.

    Args:
        directory: Created if need be.
        name: Name of both files, without suffix.
        results: Scores by method.
        about: What was evaluated and how, for the JSON file.
    """
    groups = {method: [asdict(score) for score in scores] for method, scores in results.items()}
    with written_aside(directory) as scratch:
        (scratch / f"{name}.json").write_text(json.dumps({**about, "results": groups}, indent=2) + "\n")
        with (scratch / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["method", *(field.name for field in fields(Score))])
            writer.writeheader()
            writer.writerows({"method": method, **row} for method, rows in groups.items() for row in rows)
