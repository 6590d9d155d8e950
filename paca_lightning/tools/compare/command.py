"""The command ``compare``: its options, and the comparison that they describe."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.compare.claim import claim
from paca_lightning.tools.compare.cost import cached, measure
from paca_lightning.tools.compare.driver import run_all
from paca_lightning.tools.compare.methods import FloorMethod
from paca_lightning.tools.compare.options import PROG, options
from paca_lightning.tools.compare.parsing import parse_methods
from paca_lightning.tools.compare.plots import plot
from paca_lightning.tools.compare.results import Costs, Row, print_table, rows_of, write_results
from paca_lightning.tools.compare.runs import MethodRuns, Plan
from paca_lightning.tools.compare.search import FEWEST, parse_space
from paca_lightning.tools.compare.task import Task, read_task, short_name
from paca_lightning.tools.compare.trial import LEFT_OUT
from paca_lightning.tools.environment import describe_environment


def main(arguments: Sequence[str]) -> bool:
    """Run ``paca-lightning compare``.

    Args:
        arguments: Its own options, and whatever ``fit`` takes to override the configs.

    Returns:
        Whether everything is finished; not if ``--minutes`` ended it.

    Raises:
        PaCAError: If an option or a config cannot be used, or a run fails.
    """
    command = shlex.join([PROG, *arguments])
    known, overrides = options().parse_known_args(arguments)
    plan = _plan(known)
    tasks = [
        read_task([f"--config={config}", *overrides], Path(config).stem, known.lr_key, PROG) for config in known.config
    ]
    if twice := {task.name for task in tasks if [other.name for other in tasks].count(task.name) > 1}:
        raise PaCAError(f"Two configs are called {sorted(twice)[0]!r}: their results would share a directory.")
    directory = Path(known.output)
    claim(directory, tasks, plan)
    runs = {
        task.name: [
            MethodRuns(task, method, plan, directory / task.name)
            for method in parse_methods(known.methods, known.match, task)
        ]
        for task in tasks
    }
    _announce(runs, plan)
    done = run_all([one for group in runs.values() for one in group], known.jobs, plan.metric, known.minutes)
    setup = describe_environment() | {"command": command, "plan": asdict(plan)}
    _report(tasks, runs, setup, directory, known.cost_steps if done else 0)
    if not done:
        Console().print("Stopped after --minutes. The same command goes on from here.", highlight=False)
    return done


def _plan(known: argparse.Namespace) -> Plan:
    for name in ("seeds", "steps", "search_steps", "jobs", "minutes"):
        if (value := getattr(known, name)) is not None and value <= 0:
            raise PaCAError(f"--{name.replace('_', '-')} must be positive, not {value}.")
    if known.trials < FEWEST:
        raise PaCAError(f"--trials must be at least {FEWEST}, not {known.trials}: a search begins with so many.")
    if known.cost_steps < 0:
        raise PaCAError(f"--cost-steps must not be negative, not {known.cost_steps}.")
    return Plan(
        metric=known.metric,
        maximize=known.maximize,
        space=parse_space(known.lr, "--lr"),
        trials=known.trials,
        widen=known.widen,
        seeds=known.seeds,
        steps=known.steps,
        search_steps=known.search_steps,
    )


def _announce(runs: Mapping[str, Sequence[MethodRuns]], plan: Plan) -> None:
    """Say what will run: the methods with their search spaces, and what is left out of the runs."""
    console = Console(stderr=True)
    for name, group in runs.items():
        task = group[0].task
        for one in group:
            if not isinstance(one.method, FloorMethod):
                trained = f"{one.method.count(task):,} parameters, lr {one.space}"
                trials = f", {plan.trials} trials" if one.search is not None else ""
                console.print(f"{name}: {one.method.label}: {trained}{trials}", highlight=False, soft_wrap=True)
        for one in group:
            if frozen := one.method.left_frozen(task):
                why = f"PEFT adapts stacked experts with LoRA alone; {len(frozen)} weights stay frozen"
                console.print(
                    f"{name}: {one.method.label}: {why}, {frozen[0]!r} is one.", highlight=False, soft_wrap=True
                )
        present = [short_name(entry) for entry in task.settings["trainer"]["callbacks"]]
        if left_out := [callback for callback in present if callback in LEFT_OUT]:
            console.print(f"{name}: left out of the runs: {', '.join(left_out)}.", highlight=False, soft_wrap=True)
        seeds = ", ".join(".".join(key) for key in task.seed_keys)
        console.print(f"{name}: the seeds are {seeds}, and the methods' own.", highlight=False, soft_wrap=True)


def _report(
    tasks: Sequence[Task],
    runs: Mapping[str, Sequence[MethodRuns]],
    setup: dict[str, Any],
    directory: Path,
    cost_steps: int,
) -> None:
    """Print a table of each task, and write the files."""
    all_rows: list[Row] = []
    for task in tasks:
        group = runs[task.name]
        rows = rows_of(group, _costs(task, group, directory / task.name, cost_steps))
        print_table(rows, group, Console())
        plot(rows, group, directory / f"{task.name}.png")
        all_rows += rows
    paths = write_results(all_rows, [one for group in runs.values() for one in group], setup, directory)
    for path in [*paths, *(directory / f"{task.name}.png" for task in tasks)]:
        print(path)


def _costs(task: Task, runs: Sequence[MethodRuns], directory: Path, steps: int) -> Costs:
    if steps == 0:
        return {}
    threads = torch.get_num_threads()
    key = {"methods": [one.method.label for one in runs], "steps": steps, "threads": threads}
    try:
        with Console(stderr=True).status(f"{task.name}: measuring a step of each method"):
            return cached(directory / "cost.json", key, lambda: measure(task, runs, steps, threads))
    except PaCAError as error:
        rank_zero_warn(f"{task.name}: time and memory of a step were not measured: {error}.")
        return {}
