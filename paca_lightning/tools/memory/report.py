"""What an estimate found: rows of figures, how they came about, and both as a table."""

from typing import Any

from rich.console import Console
from rich.table import Table

from paca_lightning.core.config import CALIBRATED, PaCAConfig
from paca_lightning.tools.environment import describe_environment
from paca_lightning.tools.memory.timeline import Kind, Timeline
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.units import format_bytes

GRANULARITY = 64
"""Tokens between two lengths of a sequence that are tried."""

Row = dict[str, Any]
"""Figures of one method: ``peak_bytes``, the bytes of each kind at the peak, and what fits a budget."""


def method_row(method: str, timeline: Timeline, limit: int | None) -> Row:
    """The figures of one method's step.

    Args:
        method: Its name.
        timeline: Its step.
        limit: Bytes of the budget, if there is one.
    """
    row: Row = {"method": method, "peak_bytes": timeline.peak}
    row |= {f"{kind.name.lower()}_bytes": size for kind, size in timeline.at_peak.items()}
    row |= {"peak_phase": timeline.peak_phase, "trainable_parameters": timeline.trainable_parameters}
    if limit is not None:
        row["fits"] = timeline.peak <= limit
    return row


def describe_setup(run: TracedRun, config: PaCAConfig | None, budget: str | None, seconds: float) -> dict[str, Any]:
    """What was estimated and with which versions, to be kept beside the figures.

    Args:
        run: The run.
        config: Its PaCA configuration, if it has one.
        budget: As the user wrote it.
        seconds: How long it took.
    """
    return describe_environment() | {
        "model": run.module.hparams.get("model", type(run.module).__name__),
        "config": None if config is None else config.to_dict(),
        "ranks": run.ranks,
        "sharded": run.strategy is not None,
        "precision": run.precision,
        "batch_size": run.batch_size,
        "tokens": run.tokens,
        "accumulate": run.accumulate,
        "budget": budget,
        "seconds": round(seconds, 1),
    }


def print_report(rows: list[Row], setup: dict[str, Any], console: Console) -> None:
    """Print the figures of all methods side by side, and what fits the budget if there is one.

    Args:
        rows: The run's own method first.
        setup: As :func:`describe_setup` made it.
        console: Where to.
    """
    devices = f"{setup['ranks']} devices that share the model" if setup["sharded"] else "one device"
    table = Table(
        title=f"Peak memory of a device: {setup['model']}, {setup['batch_size']} x {setup['tokens']} tokens, "
        f"{setup['precision']}, {devices}",
        title_justify="left",
    )
    table.add_column("")
    for row in rows:
        table.add_column(row["method"], justify="right")
    for kind in Kind:
        name = kind.name.lower()
        table.add_row(name.replace("_", " "), *(format_bytes(row[f"{name}_bytes"]) for row in rows))
    table.add_section()
    table.add_row("[bold]peak[/]", *(f"[bold]{format_bytes(row['peak_bytes'])}[/]" for row in rows))
    table.add_row("trained parameters", *(f"{row['trainable_parameters']:,}" for row in rows))
    if setup["budget"] is not None:
        table.add_row(f"fits {setup['budget']}", *("yes" if row["fits"] else "[red]no[/]" for row in rows))
        table.add_row("longest that fits", *(f"{row['max_tokens']:,}" if row["max_tokens"] else "-" for row in rows))
    console.print(table)
    if setup["budget"] is not None:
        tokens, batch = rows[0]["max_tokens"], rows[0]["max_batch"]
        console.print(
            f"Within {setup['budget']} at batch size {setup['batch_size']}: "
            + (f"at most {tokens} tokens." if tokens else f"not even {GRANULARITY} tokens.")
            + f" At {setup['tokens']} tokens: "
            + (f"at most batch size {batch}." if batch else "not even batch size 1.")
        )
    config = setup["config"] or {}
    if config.get("quantize") is not None and config["selection"] in CALIBRATED:
        console.print(
            f"Not counted: until the first batches have chosen the columns (selection={config['selection']}), the "
            "model is held as it is, and quantized after that."
        )
    console.print(
        "Only tensors are counted. The device's own context, communication buffers and gaps between tensors need more, "
        "often 1 to 2 GiB on a GPU."
    )
