"""Measures what docs/performance.md shows, and writes its tables and plots.

    python -m scripts.performance                      # all settings: `make bench`
    python -m scripts.performance --only small-512     # some of them
    python -m scripts.performance --only smollm2 --steps 3    # a trial; the document will say how many steps
    python -m scripts.performance --render             # measure nothing: rewrite the document from what is kept

A setting's commands are run as a user would run them. Their figures are kept in docs/performance/NAME.json. The part of
the document between `<!-- begin NAME -->` and `<!-- end NAME -->` is made from that file alone.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.performance_tables import (
    Run,
    bars,
    bench_table,
    estimate_table,
    lines,
    promises_table,
    source,
    stacks,
)

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "performance"
PROMISES = "promises"


@dataclass(frozen=True)
class Setting:
    """A table of the document.

    Args:
        commands: Arguments of ``paca-lightning`` by the run's label in the table.
        table: Makes the table.
        plot: Draws docs/performance/NAME.png. None: no plot.
    """

    commands: dict[str, str]
    table: Callable[[list[Run]], str] = bench_table
    plot: Callable[[list[Run], Path], None] | None = None


SMALL = "bench --preset small --batch 2 --tokens 512"
ADAPTERS = "--methods floor,paca:16,lora:8,lora-narrow:8"
ALL = f"{ADAPTERS},dora:8,full"
LLAMA_8B = (
    "estimate --config configs/oasst1-llama3-8b.yaml --preset llama3-8b --tokens 2048 --batch 1 "
    "--trainer.accumulate_grad_batches 1 --budget 80GB"
)
LLAMA_70B = "estimate --config configs/oasst1-llama3.1-70b-qpaca-fsdp2.yaml --preset llama3.1-70b --batch 1"
OFFLOAD = "--trainer.strategy.init_args.activation_checkpointing offload"

SETTINGS = {
    "small-512": Setting({"": f"{SMALL} --steps 15 {ALL}"}, plot=bars),
    "small-128": Setting({"": f"bench --preset small --batch 1 --tokens 128 --steps 40 {ALL}"}),
    "small-accumulate": Setting({"": f"{SMALL} --accumulate 8 --steps 5 --methods floor,paca:16,lora:8"}),
    "smollm2": Setting(
        {"": f"bench --model models/SmolLM2-135M-Instruct --batch 1 --tokens 256 --steps 10 {ALL}"}, plot=bars
    ),
    "llama3-8b-4": Setting(
        {
            "": "bench --preset llama3-8b --layers 4 --batch 1 --tokens 512 --steps 6 "
            "--methods floor,floor+selective,paca:16,paca:16+selective,lora:8"
        },
        plot=bars,
    ),
    "quantized": Setting({"": f"{SMALL} --steps 15 --methods floor,qfloor,qpaca:16,qlora:8"}),
    "checkpointing": Setting(
        {
            "": f"{SMALL} --steps 12 "
            "--methods floor,floor+selective,paca:16,paca:16+selective,paca:16+blocks,lora:8+blocks"
        }
    ),
    "compile": Setting({"": f"{SMALL} --steps 10 --compile {ADAPTERS}"}),
    "rank": Setting({"": f"{SMALL} --steps 10 --methods floor,paca:4,paca:16,paca:64,paca:256"}, plot=bars),
    "tokens": Setting(
        {
            f"{count} tokens": f"bench --preset small --batch 1 --tokens {count} --steps {steps} {ADAPTERS}"
            for count, steps in ((128, 30), (256, 20), (512, 15), (1024, 10))
        },
        plot=lines,
    ),
    "ranks": Setting(
        {
            f"{count} rank{'s'[: count - 1]}": f"{SMALL} --devices {count} --threads 1 --steps 10 "
            "--methods floor,paca:16,lora:8"
            for count in (1, 2)
        }
    ),
    "estimate-8b": Setting({"": LLAMA_8B}, estimate_table, stacks),
    "estimate-8b-checkpointing": Setting(
        {
            name: f"{LLAMA_8B} --model.init_args.activation_checkpointing {value}"
            for name, value in (("selective", "selective"), ("every block", "true"))
        },
        estimate_table,
    ),
    "estimate-70b": Setting(
        {
            f"{devices} x {tokens:,}{', offload' if offload else ''}": f"{LLAMA_70B} --trainer.devices {devices} "
            f"--tokens {tokens} --trainer.accumulate_grad_batches 1 --budget {budget}{' ' + OFFLOAD if offload else ''}"
            for devices, tokens, offload, budget in (
                (8, 8192, False, "24GiB"),
                (8, 8192, True, "24GiB"),
                (4, 4096, False, "24GiB"),
                (1, 16384, False, "80GB"),
            )
        },
        estimate_table,
    ),
}


def measure(setting: Setting, steps: int | None = None) -> list[Run]:
    """Run a setting's commands, one after the other.

    Args:
        setting: What to run.
        steps: Timed steps. Default: the setting's.
    """
    # A thread limit of this environment would change the figures.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    runs = []
    for label, command in setting.commands.items():
        if steps is not None:
            command = re.sub(r"--steps \d+", f"--steps {steps}", command)
        print(f"\n$ paca-lightning {command}", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            estimates = command.startswith("estimate")
            file = Path(directory, "estimate.json" if estimates else "bench.json")
            output = ["--json", str(file)] if estimates else ["--output", directory]
            words = [sys.executable, "-m", "paca_lightning.cli", *shlex.split(command), *output]
            finished = subprocess.run(words, cwd=ROOT, env=environment)  # noqa: S603  (our own commands)
            if finished.returncode and not (estimates and finished.returncode == 1):  # 1: does not fit
                sys.exit(f"The command ended with exit code {finished.returncode}.")
            report = json.loads(file.read_text())
        report["setup"].pop("command", None)  # it has paths of this machine
        runs.append({"label": label, "command": f"paca-lightning {command}", **report})
    return runs


def load() -> dict[str, list[Run]]:
    """The kept figures, by setting; settings without figures are missing."""
    files = {name: RESULTS / f"{name}.json" for name in SETTINGS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def render(document: str, measured: dict[str, list[Run]]) -> str:
    """The document with its tables replaced.

    Args:
        document: Its text, with a pair of marks for each setting and for the promises.
        measured: Runs by setting.
    """
    for name in [PROMISES, *SETTINGS]:
        body = promises_table(measured) if name == PROMISES else _section(name, measured.get(name))
        marks = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = rf"{marks[0]}\n.*?{marks[1]}"
        block = f"{marks[0]}\n\n{body}\n\n{marks[1]}"
        document, count = re.subn(pattern, lambda _, block=block: block, document, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{DOCUMENT.name} has {count} parts {marks[0]} ... {marks[1]}, not one.")
    return document


def _section(name: str, runs: list[Run] | None) -> str:
    if runs is None:
        return f"Not measured yet: `make bench ONLY={name}`."
    parts = [source(runs), SETTINGS[name].table(runs)]
    if SETTINGS[name].plot is not None:
        parts.append(f"![{name}](performance/{name}.png)")
    return "\n\n".join(parts)


def main() -> None:
    """Measure the chosen settings, keep their figures, and rewrite plots and document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        metavar="NAME",
        help="settings to measure, from: %(choices)s. Default: all",
    )
    parser.add_argument("--steps", type=int, help="timed steps of each method. Default: the setting's")
    parser.add_argument("--render", action="store_true", help="measure nothing: rewrite the document from what is kept")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.only:
        if not arguments.render:
            runs = measure(SETTINGS[name], arguments.steps)
            (RESULTS / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")
        measured, plot = load(), SETTINGS[name].plot
        if name in measured and plot is not None:
            plot(measured[name], RESULTS / f"{name}.png")
        DOCUMENT.write_text(
            render(DOCUMENT.read_text(), measured)
        )  # after each setting, so that an interruption loses little


if __name__ == "__main__":
    main()
