"""Predict the memory of a run from its config, without its weights and its devices."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.memory.baselines import FULL, LORA, NARROW_LORA, PACA
from paca_lightning.tools.memory.described_run import converter, read_config, traced_run
from paca_lightning.tools.memory.traced_run import TracedModel
from paca_lightning.tools.memory.traced_step import TracedRun
from paca_lightning.tools.memory.tracing import Kind, Timeline
from paca_lightning.tools.presets import PRESETS
from paca_lightning.tools.provenance import provenance
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
        rows[0]["max_tokens"] = _longest(model, own, limit)
        rows[0]["max_batch"] = _largest(
            lambda size: model.step(batch_size=size).peak, limit, (run.batch_size, own.peak), resident
        )
    if config is not None:
        for baseline in (LORA, NARROW_LORA, FULL):
            model = TracedModel(replace(run, convert=converter(baseline, config)))
            other = model.step()
            rows.append(_row(baseline.name, other, limit))
            if limit is not None:
                rows[-1]["max_tokens"] = _longest(model, other, limit)
    setup = _setup(run, config, budget, time.perf_counter() - start) | ({"model": name} if name else {})
    _print(rows, setup, limit, console or Console())
    if json_file:
        Path(json_file).write_text(json.dumps({"rows": rows, "setup": setup}, indent=2) + "\n", encoding="utf-8")
    return limit is None or own.peak <= limit


def _longest(model: TracedModel, step: Timeline, limit: int) -> int:
    """Longest sequence, in multiples of 64 tokens, whose step is within a limit; ``step`` is that of the run's own."""
    return GRANULARITY * _largest(
        lambda units: model.step(tokens=GRANULARITY * units).peak,
        limit,
        (max(1, model.run.tokens // GRANULARITY), step.peak),
        sum(step.at_peak[kind] for kind in RESIDENT),
    )


def _largest(peak: Callable[[int], int], limit: int, known: tuple[int, int], resident: int) -> int:
    """The most units whose peak is within a limit, to 1%. Peaks grow almost in proportion, which saves tries.

    Args:
        peak: Of a number of units.
        limit: Bytes.
        known: A number of units and their peak.
        resident: Bytes that no units would need.
    """
    if resident >= limit:
        return 0
    (units, size), below, low, above, high = known, 0, resident, 0, 0
    while not above:
        if size > limit:
            above, high = units, size
        else:
            line = (units - below) / max(size - low, 1)  # through the last two points
            below, low = units, size
            units = below + max(int(line * (limit - low)), 1, below // 100)
            size = peak(units)
    misses = 0  # in a row: where peaks are far from proportional, the line alone would come nearer by single units
    while above - below > max(1, below // 100):
        share = (limit - low) / (high - low) / 2**misses
        units = below + min(max(int(share * (above - below)), 1), above - below - 1)
        size = peak(units)
        if size <= limit:
            below, low, misses = units, size, 0
            # One more step beyond the line usually closes the bracket.
            step = max(1, below // 100)
            if below + step < above and (beyond := peak(below + step)) > limit:
                above, high = below + step, beyond
        else:
            above, high, misses = units, size, misses + 1
    return below


def _row(method: str, timeline: Timeline, limit: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "peak_bytes": timeline.peak}
    row |= {f"{kind.name.lower()}_bytes": size for kind, size in timeline.at_peak.items()}
    row |= {"peak_phase": timeline.peak_phase, "trainable_parameters": timeline.trainable_parameters}
    if limit is not None:
        row["fits"] = timeline.peak <= limit
    return row


def _setup(run: TracedRun, config: PaCAConfig | None, budget: str | None, seconds: float) -> dict[str, Any]:
    return provenance() | {
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
        table.add_row("longest that fits", *(f"{row['max_tokens']:,}" if row["max_tokens"] else "-" for row in rows))
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
    """``paca-lightning estimate``: returns the exit code, 1 if the run does not fit the budget.

    Raises:
        PaCAError: If an argument is outside its range, or the run cannot be traced.
    """
    known, others = _options().parse_known_args(arguments)
    if not others:
        raise PaCAError(
            "estimate needs a run to look at: paca-lightning estimate --config FILE. With --help it says more."
        )
    for name in ("tokens", "batch"):
        if (value := getattr(known, name)) is not None and value < 1:
            raise PaCAError(f"--{name} must be at least 1, not {value}.")
    if known.budget is not None:
        parse_bytes(known.budget)
    if known.json_file and not Path(known.json_file).parent.is_dir():
        raise PaCAError(f"--json {known.json_file!r}: there is no directory {str(Path(known.json_file).parent)!r}.")
    module, datamodule, trainer = read_config(others, known.preset)
    run, config = traced_run(module, datamodule, trainer, known.tokens, known.batch)
    with Console(stderr=True).status("tracing the run, and others beside it"):
        fits = estimate(run, config, budget=known.budget, json_file=known.json_file, name=known.preset)
    return 0 if fits else 1


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="paca-lightning estimate",
        usage="%(prog)s --config FILE [options] [whatever fit takes to override the config]",
        description="""\
Predict the peak memory of each device in a run, by kind, beside LoRA and full
fine-tuning. The model is built from its config.json alone, and one step of the
run's own code is traced without computing: neither weights nor devices are
needed. Exit code 1: the run does not fit the budget.""",
        epilog="""examples:
  paca-lightning estimate --config configs/quickstart.yaml --budget 4GiB
  paca-lightning estimate --config configs/oasst1-llama3-8b.yaml \\
      --preset llama3-8b --tokens 2048 --batch 1 --budget 80GB
  paca-lightning estimate --config FILE --trainer.devices 8 --trainer.strategy paca_fsdp2

paca-lightning fit --help lists what overrides the config.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument(
        "--budget",
        metavar="SIZE",
        help="memory of one device, such as 24GiB or 80GB: says whether the run fits, the longest sequences that do "
        "with each method, and the largest batch. Leave 1 to 2 GiB of a GPU to its context and to gaps",
    )
    options.add_argument("--json", dest="json_file", metavar="FILE", help="write the same figures, in bytes")
    options.add_argument(
        "--preset",
        metavar="NAME",
        help=f"a known shape instead of the config's model, which then need not be downloaded: {', '.join(PRESETS)}",
    )
    options.add_argument(
        "--tokens", type=int, metavar="N", help="length of a sequence instead of the data's max_length"
    )
    options.add_argument(
        "--batch", type=int, metavar="N", help="sequences of a micro-batch instead of the data's batch_size"
    )
    return options
