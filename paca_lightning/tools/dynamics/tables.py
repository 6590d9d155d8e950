"""The figures of a history as tables: one row a step, one a layer and step, and the rows that were recited first."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from paca_lightning.adapters.history import Point
from paca_lightning.core.files import replacing
from paca_lightning.tools.dynamics.movement import Movement
from paca_lightning.tools.dynamics.points import Measured

Row = dict[str, Any]
SHOWN_CONTEXT = 16  # tokens of a recited row's context


def step_rows(
    points: Mapping[int, Point],
    measured: Sequence[Measured],
    layers: Mapping[int, Sequence[Movement]],
    whole: Mapping[int, tuple[float, float | None]],
) -> list[Row]:
    """One row a step: what the run knew, what was measured, and how far all columns together had moved.

    Args:
        points: By step, of the steps that were measured.
        measured: The sets of rows.
        layers: How each layer moved, by step; empty where no columns are trained.
        whole: Norm of all updates together and their cosine to the last ones, by step.
    """
    rows = []
    for step, point in sorted(points.items()):
        row: Row = {"step": step, "tokens": point.tokens, "train_loss": point.train_loss}
        row |= {"held_out_loss": point.held_out_loss, "held_out_step": point.held_out_step}
        for one in measured:
            counts, lengths = one.recited[step], [len(excerpt.continuation) for excerpt in one.excerpts]
            exact = sum(count == length for count, length in zip(counts, lengths, strict=True))
            name = one.rows.name
            row[f"loss/{name}"] = one.losses[step]
            row[f"recited/{name}"] = exact / len(counts) if counts else None
            row[f"recited tokens/{name}"] = sum(counts) / sum(lengths) if counts else None
            row[f"longest/{name}"] = max(counts, default=None)
        if whole:
            ranks = [layer["effective_rank"] for layer in layers[step] if layer["effective_rank"] is not None]
            row |= {"norm": whole[step][0], "cosine": whole[step][1]}
            row["effective_rank"] = sum(ranks) / len(ranks) if ranks else None
        rows.append(row)
    return rows


def recited_rows(one: Measured, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a set that were recited exactly at some step, those first that were so first.

    Args:
        one: The set.
        tokenizer: Decodes context and continuation.
    """
    files, numbers = one.rows.split.files(), one.rows.split.column("row")
    steps, rows = sorted(one.recited), []
    for place, excerpt in enumerate(one.excerpts):
        exact = [step for step in steps if one.recited[step][place] == len(excerpt.continuation)]
        if exact:
            rows.append(
                {
                    "first_step": exact[0],
                    "at_last_step": exact[-1] == steps[-1],
                    "file": files[excerpt.row],
                    "row": int(numbers[excerpt.row]),
                    "tokens": len(excerpt.continuation),
                    "context": str(tokenizer.decode(excerpt.context[-SHOWN_CONTEXT:])),
                    "continuation": str(tokenizer.decode(excerpt.continuation)),
                }
            )
    return sorted(rows, key=lambda row: (row["first_step"], -row["tokens"]))


def write_csv(rows: Sequence[Row], path: Path, columns: Sequence[str] = ()) -> None:
    """Write rows with their keys as columns.

    Args:
        rows: All with the same keys.
        path: CSV to write.
        columns: Names for a table without rows.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else list(columns))
        writer.writeheader()
        writer.writerows(rows)


def print_steps(rows: Sequence[Row], sets: Sequence[str], console: Console) -> None:
    """Print the steps as a table."""
    table = Table(box=None)
    for heading in ("step", *(f"loss {name}" for name in sets), *(f"recited {name}" for name in sets)):
        table.add_column(heading, justify="right")
    moved = [heading for heading in ("norm", "cosine") if heading in rows[0]]
    for heading in moved:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [str(row["step"]), *(shown(row[f"loss/{name}"]) for name in sets)]
        cells += [shown(row[f"recited/{name}"], percent=True) for name in sets]
        table.add_row(*cells, *(shown(row[heading]) for heading in moved))
    console.print(table)


def shown(value: float | None, percent: bool = False) -> str:
    """A number as a table shows it."""
    return "-" if value is None else f"{value:.1%}" if percent else f"{value:.4g}"
