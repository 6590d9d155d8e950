"""Predicts the memory of a run, and of other methods on the same model beside it."""

import json
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing
from paca_lightning.tools.memory.baselines import FULL, LORA, NARROW_LORA, PACA
from paca_lightning.tools.memory.report import GRANULARITY, Row, describe_setup, method_row, print_report
from paca_lightning.tools.memory.search import largest_fitting
from paca_lightning.tools.memory.timeline import Kind, Timeline
from paca_lightning.tools.memory.traced_model import TracedModel
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.units import format_bytes, parse_bytes


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
        json_file: Where to write the same figures.
        name: Of the model, for the table.
        console: Where to print. Default: standard output.

    Returns:
        Whether the run fits the budget; True without one.

    Raises:
        PaCAError: If the budget is below the model itself.
    """
    start = time.perf_counter()
    limit = parse_bytes(budget) if budget else None
    rows = [_own_row(run, PACA.name if config else FULL.name, limit)]
    if config is not None:
        for baseline in (LORA, NARROW_LORA, FULL):
            model = TracedModel(replace(run, convert=baseline.converter(config)))
            step = model.step()
            rows.append(method_row(baseline.name, step, limit))
            if limit is not None:
                rows[-1]["max_tokens"] = _longest_sequence(model, step, limit)
    setup = describe_setup(run, config, budget, time.perf_counter() - start) | ({"model": name} if name else {})
    print_report(rows, setup, console or Console())
    if json_file:
        with replacing(Path(json_file)) as temporary:
            temporary.write_text(json.dumps({"rows": rows, "setup": setup}, indent=2) + "\n", encoding="utf-8")
    return bool(rows[0].get("fits", True))


def _own_row(run: TracedRun, method: str, limit: int | None) -> Row:
    """Figures of the run as it is configured, and the longest sequence and largest batch within a limit."""
    model = TracedModel(run)
    step = model.step()
    row = method_row(method, step, limit)
    if limit is not None:
        resident = _resident_bytes(step)
        if limit <= resident:
            raise PaCAError(
                f"A budget of {format_bytes(limit)} is below the model itself: its parameters and the optimizer's "
                f"state take {format_bytes(resident)} on each device. Shard it over more devices, or quantize it."
            )
        row["max_tokens"] = _longest_sequence(model, step, limit)
        row["max_batch"] = largest_fitting(
            lambda size: model.step(batch_size=size).peak, limit, (run.batch_size, step.peak), resident
        )
    return row


def _longest_sequence(model: TracedModel, step: Timeline, limit: int) -> int:
    """Tokens of the longest sequence within a limit; ``step`` is the model's at the run's own length."""
    return GRANULARITY * largest_fitting(
        lambda units: model.step(tokens=GRANULARITY * units).peak,
        limit,
        (max(1, model.run.tokens // GRANULARITY), step.peak),
        _resident_bytes(step),
    )


def _resident_bytes(step: Timeline) -> int:
    """Bytes that no sequence needs: parameters and the optimizer's state."""
    return step.at_peak[Kind.PARAMETERS] + step.at_peak[Kind.OPTIMIZER]
