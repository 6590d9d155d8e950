"""A plot of the losses of a run."""

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing
from paca_lightning.tasks.callbacks.run_directory import run_directory

Curve = tuple[list[int], list[float]]


class LossPlot(Callback):
    """Plots the training and held-out loss over the steps to ``loss.png``, beside ``metrics.csv``, when a run ends.

    With ``fast_dev_run``, Lightning keeps no metrics, and nothing is drawn.

    Args:
        train: Column of the training loss in ``metrics.csv``.
        held_out: Column of the held-out loss.

    Raises:
        PaCAError: If the trainer has no ``CSVLogger``, or its directory cannot be written.
    """

    def __init__(self, train: str = "train/loss", held_out: str = "val/loss") -> None:
        self.labels = {train: "training", held_out: "held out"}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training that there will be metrics to plot."""
        if stage != "fit" or _keeps_no_metrics(trainer):
            return
        if not any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            raise PaCAError(
                "LossPlot draws what a CSVLogger wrote, and the trainer has none. Add "
                "lightning.pytorch.loggers.CSVLogger to the trainer's loggers, or leave the callback out."
            )
        run_directory(trainer)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot the losses."""
        if _keeps_no_metrics(trainer):
            return
        logger = next(logger for logger in trainer.loggers if isinstance(logger, CSVLogger))
        logger.save()
        metrics = Path(logger.log_dir) / "metrics.csv"
        curves = read_curves(metrics, list(self.labels)) if metrics.is_file() else {}
        if not any(steps for steps, _ in curves.values()):
            rank_zero_warn(f"LossPlot: {list(self.labels)} were never logged, so there is nothing to draw.")
            return
        path = metrics.with_name("loss.png")
        self._draw(curves, path)
        rank_zero_info(f"Metrics: {metrics}\nLoss plot: {path}")

    def _draw(self, curves: dict[str, Curve], path: Path) -> None:
        # Not pyplot, which opens windows and keeps global state.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss per token (nats)")
        for name, (steps, values) in curves.items():
            if steps:
                axes.plot(steps, values, marker="o" if len(steps) < 20 else None, markersize=4, label=self.labels[name])
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)


def _keeps_no_metrics(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def read_curves(metrics: Path, names: list[str]) -> dict[str, Curve]:
    """Steps and values of the named columns of a CSV file; rows without a value are skipped."""
    curves: dict[str, Curve] = {name: ([], []) for name in names}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, (steps, values) in curves.items():
                if row.get(name):
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
    return curves
