"""Plots along a history, over the steps on a logarithmic axis that holds step 0."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

from paca_lightning.tools.dynamics.movement import Movement, shares_by_kind
from paca_lightning.tools.dynamics.tables import Row

Panel = Callable[[Any], None]
"""Draws into matplotlib's axes."""


def draw(panels: Sequence[tuple[str, Panel]]) -> bytes:
    """A PNG with some panels side by side.

    Args:
        panels: What each one's vertical axis shows, and what draws it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (label, panel) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number, xlabel="optimizer step", ylabel=label)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
        panel(axes)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    image = BytesIO()
    figure.savefig(image, dpi=110, format="png")
    return image.getvalue()


def lines(rows: Sequence[Row], names: Mapping[str, str]) -> Panel:
    """A line for each of some columns of rows that have a ``step``; gaps where there is no value.

    Args:
        rows: In order.
        names: Labels by column.
    """

    def panel(axes: Any) -> None:
        for column, label in names.items():
            values = [float("nan") if row[column] is None else row[column] for row in rows]
            axes.plot([row["step"] for row in rows], values, marker="o", markersize=3, label=label)

    return panel


def by_kind(layers: Mapping[int, Sequence[Movement]], quantity: str) -> Panel:
    """The mean of a quantity over the layers of each kind."""
    rows: list[Row] = []
    kinds = sorted({layer["kind"] for of_step in layers.values() for layer in of_step})
    for step, of_step in sorted(layers.items()):
        row: Row = {"step": step}
        for kind in kinds:
            values = [layer[quantity] for layer in of_step if layer["kind"] == kind and layer[quantity] is not None]
            row[kind] = sum(values) / len(values) if values else None
        rows.append(row)
    return lines(rows, {kind: kind for kind in kinds})


def shares(layers: Mapping[int, Sequence[Movement]]) -> Panel:
    """Each kind's share in the squared norm of all, stacked."""
    moved = {step: found for step, of in sorted(layers.items()) if any((found := shares_by_kind(of)).values())}

    def panel(axes: Any) -> None:
        if moved:
            kinds = sorted(next(iter(moved.values())))
            heights = [[of_step[kind] for of_step in moved.values()] for kind in kinds]
            axes.stackplot(list(moved), heights, labels=kinds, alpha=0.8)

    return panel
