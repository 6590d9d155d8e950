"""The paper's comparison (arXiv 2503.01905) in one command: time, memory, longest sequence and throughput."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.bench.results import Row, print_table

PAPER = "paper"
"""The preset's name."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sequences in a batch, tried until one does not fit, for the highest throughput."""

CPU_BATCHES = 3
"""How many of them a CPU takes, which gains nothing from more and would take hours."""

ABSTRACT = "abstract, LoRA r=8, A100"
LOG = "the authors' log, 4 x 512 tokens, r=8"


class NotEnoughMemoryError(PaCAError):
    """A method needs more memory than there is."""


@dataclass(frozen=True)
class Claim:
    """A published change of a figure from one method to another, both at rank 8.

    Attributes:
        text: What is compared.
        figure: Its name in a row of ``bench.json``.
        methods: The method, and the one it is compared with.
        published: Relative change, such as -0.22.
        source: Where it is published. The paper's tables could not be read when this was written.
    """

    text: str
    figure: str
    methods: tuple[str, str]
    published: float
    source: str

    def ours(self, rows: list[Row]) -> float | None:
        """The same change in our rows; None if they do not have it."""
        figures = {row["method"]: row.get(self.figure) for row in rows if row["r"] == 8}
        ours, other = (figures.get(method) for method in self.methods)
        return None if not ours or not other else ours / other - 1


@dataclass(frozen=True)
class Part:
    """A part of the comparison.

    Attributes:
        name: Of its folder in the output.
        methods: As ``bench`` takes them.
        claims: What it shows.
        batches: Sequences in a batch, each measured for itself until one does not fit; of each method the fastest
            counts.
        longest: Whether the longest sequence is looked for, which needs a budget.
    """

    name: str
    methods: str
    claims: tuple[Claim, ...] = ()
    batches: tuple[int, ...] = (4,)
    longest: bool = False


LORA = ("paca", "lora")
PARTS = (
    Part(
        "step",
        "paca:8,paca:16,lora:8,dora:8",
        (
            Claim("time of a step, PaCA against LoRA", "step_ms", LORA, -0.22, ABSTRACT),
            Claim("time of a step, PaCA against DoRA", "step_ms", ("paca", "dora"), 421.6 / 1001.4 - 1, LOG),
            Claim("peak memory, PaCA against LoRA", "peak_bytes", LORA, -0.16, ABSTRACT),
        ),
    ),
    Part("quantized", "qpaca:8,qlora:8", (Claim("time, QPaCA against QLoRA", "step_ms", ("qpaca", "qlora"), 0, ""),)),
    Part(
        "throughput",
        "paca:8,lora:8",
        (Claim("tokens a second, PaCA against LoRA", "tokens_per_second", LORA, 0.16, ABSTRACT),),
        batches=BATCHES,
    ),
    Part(
        "longest",
        "paca:8,lora:8",
        (Claim("longest sequence, PaCA against LoRA", "max_tokens", LORA, 0.23, ABSTRACT),),
        batches=(1,),
        longest=True,
    ),
)


@dataclass
class Outcome:
    """What a part gave.

    Attributes:
        part: Its name.
        rows: As in ``bench.json``; the fastest batch of each method, if there were several.
        stopped: Why it was not measured, or what no longer fitted.
    """

    part: str
    rows: list[Row] = field(default_factory=list)
    stopped: str = ""


def compare_with_paper(
    measure: Callable[..., list[Row]],
    options: dict[str, Any],
    model: str | None,
    layers: int | None,
    budget: str | None,
    output: Path | None,
) -> list[Row]:
    """Measure each part, and print our figures beside the published ones.

    Args:
        measure: ``bench``.
        options: Those of its options that all parts share, such as the device.
        model: Another model than Llama-3-8B.
        layers: Use this many layers. Default: all; one of Llama-3-8B on a CPU.
        budget: Memory of the device, for the longest sequence. Default: 95% of a GPU's. On a CPU, whose memory others
            use as well, that part is left out.
        output: Directory for each part's results, and for ``paper.json``, which is written after each part.

    Returns:
        The rows of all parts.
    """
    if options["device"] == "cuda" and budget is None:
        budget = f"{0.95 * torch.cuda.get_device_properties(0).total_memory:.0f}"
    if options["device"] == "cpu" and model is None:
        layers = layers or 1
    base = {"preset": "llama3-8b"} if model is None else {"model": model}
    outcomes = measure_parts(measure, options | base | {"layers": layers}, budget, output)
    print_comparison(outcomes)
    return [row for outcome in outcomes for row in outcome.rows]


def measure_parts(
    measure: Callable[..., list[Row]], options: dict[str, Any], budget: str | None, output: Path | None
) -> list[Outcome]:
    """What each part gives. The arguments are those of :func:`compare_with_paper`."""
    outcomes: list[Outcome] = []
    for part in PARTS:
        outcomes.append(_measure(measure, part, options, budget, output))
        if output is not None:
            text = json.dumps([asdict(outcome) for outcome in outcomes], indent=2)
            (output / "paper.json").write_text(text + "\n", encoding="utf-8")
    return outcomes


def _measure(
    measure: Callable[..., list[Row]], part: Part, options: dict[str, Any], budget: str | None, output: Path | None
) -> Outcome:
    outcome = Outcome(part.name)
    if part.longest and budget is None:
        outcome.stopped = "the longest sequence on a CPU needs --max-length, as others use its memory, too"
        return outcome
    batches = part.batches[:CPU_BATCHES] if options["device"] == "cpu" else part.batches
    for batch in batches:
        settings = {**options, "methods": part.methods, "batch": batch, "max_length": budget if part.longest else None}
        if output is not None:
            name = part.name if len(part.batches) == 1 else f"{part.name}-{batch}"
            settings["output"] = str(output / name)
        try:
            rows = measure(**settings)
        except (NotEnoughMemoryError, torch.OutOfMemoryError) as error:
            outcome.stopped = f"batch {batch}: {str(error).splitlines()[0]}"
            break
        outcome.rows = [max(pair, key=lambda row: row["tokens_per_second"]) for pair in _pairs(outcome.rows, rows)]
    return outcome


def _pairs(before: list[Row], now: list[Row]) -> list[tuple[Row, ...]]:
    """The rows of each method, of earlier batches and of this one."""
    return list(zip(before, now, strict=True)) if before else [(row,) for row in now]


def print_comparison(outcomes: list[Outcome], console: Console | None = None) -> None:
    """Print each part's rows, then the published figures beside ours.

    Args:
        outcomes: What was measured.
        console: Where to print. Default: standard output.
    """
    console = console or Console()
    table = Table(title="The paper's claims", title_justify="left")
    for column in ("", "published", "here", "published in"):
        table.add_column(column)
    for outcome, part in zip(outcomes, PARTS, strict=True):
        if outcome.rows and len(part.batches) > 1:
            print_table(outcome.rows, f"{part.name}: the fastest batch of each method", console)
        for claim in part.claims:
            ours = claim.ours(outcome.rows)
            here = "not measured" if ours is None else _percent(ours)
            table.add_row(claim.text, _percent(claim.published) if claim.source else "-", here, claim.source or "-")
    console.print(table)
    for outcome in outcomes:
        if outcome.stopped:
            console.print(f"{outcome.part}: {outcome.stopped}", soft_wrap=True, markup=False)
    console.print(
        "What differs from the paper: the device; random weights and tokens at real shapes; PEFT's LoRA and DoRA with "
        "adapters in fp32, without dropout; AdamW (fused) on every method; the loss over all tokens."
    )


def _percent(change: float) -> str:
    return f"{change:+.0%}"
