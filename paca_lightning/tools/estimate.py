"""Predict the memory of a run from its config, without its weights and its devices."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paca_lightning.config import PaCAConfig
from paca_lightning.errors import PaCAError
from paca_lightning.tools.baselines import FULL, LORA, NARROW_LORA, PACA
from paca_lightning.tools.described_run import converter, read_config, traced_run
from paca_lightning.tools.traced_run import TracedModel
from paca_lightning.tools.traced_step import TracedRun
from paca_lightning.tools.tracing import Kind, Timeline
from paca_lightning.tools.units import format_bytes, parse_bytes

GRANULARITY = 64  # tokens between two lengths that are tried
RESIDENT = (Kind.PARAMETERS, Kind.OPTIMIZER)


def estimate(
    run: TracedRun,
    config: PaCAConfig | None = None,
    *,
    budget: str | None = None,
    json_file: str | None = None,
    name: str | None = None,
    console: Console | None = None,
) -> bool:
    """Print the peak memory of one device by kind, beside what LoRA and full fine-tuning would need.

    Args:
        run: The run.
        config: Its PaCA configuration, whose layers and rank LoRA takes over.
        budget: Memory of one device, such as ``24GiB``: also find the longest sequences and the largest batch that fit.
        json_file: Where to write the same.
        name: Of the model, for the table.
        console: Where to print. Default: standard output.

    Returns:
        Whether the run fits the budget; True without one.

    Raises:
        PaCAError: If the budget is below the model itself.
    """
    start = time.perf_counter()
    limit = parse_bytes(budget) if budget else None
    model = TracedModel(run)
    own = model.step()
    own_name = PACA.name if config else FULL.name
    rows = [_row(own_name, own, limit)]
    if limit is not None:
        resident = sum(own.at_peak[kind] for kind in RESIDENT)
        if limit <= resident:
            raise PaCAError(
                f"A budget of {budget} is below the model itself: its parameters and the optimizer's state take "
                f"{format_bytes(resident)} on each device. Shard it over more devices, or quantize it."
            )
        rows[0]["max_tokens"] = GRANULARITY * _largest(
            lambda units: model.step(tokens=GRANULARITY * units).peak, limit, max(1, run.tokens // GRANULARITY)
        )
        rows[0]["max_batch"] = _largest(lambda units: model.step(batch_size=units).peak, limit, run.batch_size)
    if config is not None:
        for baseline in (LORA, NARROW_LORA, FULL):
            other = replace(run, convert=converter(baseline, config))
            rows.append(_row(baseline.name, TracedModel(other).step(), limit))
    setup = _setup(run, config, budget, time.perf_counter() - start) | ({"model": name} if name else {})
    _print(rows, setup, limit, console or Console())
    if json_file:
        Path(json_file).write_text(json.dumps({"rows": rows, "setup": setup}, indent=2) + "\n", encoding="utf-8")
    return limit is None or own.peak <= limit


def _largest(peak: Callable[[int], int], limit: int, guess: int) -> int:
    """The most units whose peak is within a limit, to 1%; peaks grow almost in proportion, which saves tries."""
    below, above = 0, 0
    low, high = 0, 0
    while not above:
        at_guess = peak(guess)
        if at_guess <= limit:
            below, low, guess = guess, at_guess, 2 * guess
        else:
            above, high = guess, at_guess
    if not below:
        if above == 1 or (low := peak(1)) > limit:
            return 0
        below = 1
    while above - below > max(1, below // 100):
        share = (limit - low) / (high - low)
        guess = below + min(max(int(share * (above - below)), 1), above - below - 1)
        at_guess = peak(guess)
        if at_guess <= limit:
            below, low = guess, at_guess
            # One more step beyond the line usually closes the bracket.
            step = max(1, below // 100)
            if below + step < above and (beyond := peak(below + step)) > limit:
                above, high = below + step, beyond
        else:
            above, high = guess, at_guess
    return below


def _row(method: str, timeline: Timeline, limit: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "peak_bytes": timeline.peak}
    row |= {f"{kind.name.lower()}_bytes": size for kind, size in timeline.at_peak.items()}
    row |= {"peak_phase": timeline.peak_phase, "trainable_parameters": timeline.trainable_parameters}
    if limit is not None:
        row["fits"] = timeline.peak <= limit
    return row


def _setup(run: TracedRun, config: PaCAConfig | None, budget: str | None, seconds: float) -> dict[str, Any]:
    return {
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


def _print(rows: list[dict[str, Any]], setup: dict[str, Any], limit: int | None, console: Console) -> None:
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
    if limit is not None:
        table.add_row(f"fits {setup['budget']}", *("yes" if row["fits"] else "[red]no[/]" for row in rows))
    console.print(table)
    if limit is not None:
        tokens, batch = rows[0]["max_tokens"], rows[0]["max_batch"]
        console.print(
            f"Within {setup['budget']} at batch size {setup['batch_size']}: "
            + (f"at most {tokens} tokens." if tokens else f"not even {GRANULARITY} tokens.")
            + f" At {setup['tokens']} tokens: "
            + (f"at most batch size {batch}." if batch else "not even batch size 1.")
        )
    console.print(
        "Tensors only: the device's own context, communication buffers and gaps between tensors come on top, often 1 "
        "to 2 GiB on a GPU."
    )


def main(arguments: list[str]) -> int:
    """``paca-lightning estimate``: returns the exit code, 1 if the run does not fit the budget."""
    import argparse

    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--budget")
    options.add_argument("--json", dest="json_file")
    options.add_argument("--preset")
    options.add_argument("--tokens", type=int)
    options.add_argument("--batch", type=int)
    known, others = options.parse_known_args(arguments)
    module, datamodule, trainer = read_config(others, known.preset)
    run, config = traced_run(module, datamodule, trainer, known.tokens, known.batch)
    return 0 if estimate(run, config, budget=known.budget, json_file=known.json_file, name=known.preset) else 1
