"""``fit --lr auto``: a short search for the learning rate before a run."""

import argparse
import shlex
from pathlib import Path

from rich.console import Console

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.compare.driver import run_all
from paca_lightning.tools.compare.methods import AsConfigured
from paca_lightning.tools.compare.results import edge_note
from paca_lightning.tools.compare.runs import MethodRuns, Plan
from paca_lightning.tools.compare.search import FEWEST, parse_space
from paca_lightning.tools.compare.task import Task, read_task

PROG = "paca-lightning fit"
OPTION = "--lr"
STEPS = 50
HELP = f"""\
{OPTION} auto: search the learning rate first, by short runs that are compared by
validation, then train with it. {OPTION} 1e-4:1e-2 says between which rates.
Also: --lr-trials N (default: 5), --lr-steps N of each (default: {STEPS}, at most
the run's), --lr-metric NAME (default: val/loss), --lr-jobs N at a time, --lr-key
KEY (where the learning rate is in the config). --ckpt_path last and best look
through the earlier versions of this run."""


def asks_for_search(arguments: list[str]) -> bool:
    """Whether a command line of ``fit`` has ``--lr``."""
    return any(argument.partition("=")[0] == OPTION for argument in arguments)


def with_learning_rate(arguments: list[str]) -> list[str]:
    """The arguments of ``fit`` with the learning rate that a search has found in place of ``--lr auto``.

    It says what it found, and the command to repeat the run without the search. Trials are kept in ``lr-search`` in the
    run's ``default_root_dir``, so that a search that was stopped goes on.

    Args:
        arguments: Those after ``fit``.

    Raises:
        PaCAError: If an option or the config cannot be used, a trial fails, or every learning rate diverged.
    """
    known, others = _options().parse_known_args(arguments)
    if any(argument.partition("=")[0] == "--ckpt_path" for argument in others):
        raise PaCAError("--lr searches for a new run; one that is resumed (--ckpt_path) has its learning rate.")
    if known.lr_trials < FEWEST or known.lr_steps < 1 or known.lr_jobs < 1:
        raise PaCAError(f"--lr-trials must be at least {FEWEST}, --lr-steps and --lr-jobs at least 1.")
    space = parse_space(known.lr, OPTION)
    task = read_task(others, "run", known.lr_key, PROG)
    steps = min(known.lr_steps, _max_steps(task) or known.lr_steps)
    plan = Plan(metric=known.lr_metric, space=space, trials=known.lr_trials, seeds=0, steps=steps)
    directory = Path(task.settings["trainer"]["default_root_dir"] or ".") / "lr-search"
    runs = MethodRuns(task, AsConfigured("run"), plan, directory)
    if runs.search is None:
        raise PaCAError(f"{OPTION} {known.lr} is one learning rate: there is nothing to search. Give LOW:HIGH or auto.")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"Searching the learning rate: {runs.space}, {plan.trials} runs of {steps} steps.")
    run_all([runs], known.lr_jobs, plan.metric)
    tried = ", ".join(f"{lr:g}: {value:.4f}" for lr, value in runs.search.tried)
    if (best := runs.search.best) is None:
        raise PaCAError(f"Every learning rate of {runs.space} diverged. Give lower ones: {OPTION} LOW:HIGH.")
    setting = f"--{'.'.join(task.lr_key)}={best.lr:g}"
    console.print(f"Learning rate {best.lr:g}: {plan.metric} {best.value:.4f} after {steps} steps. Tried: {tried}.")
    if runs.search.edge is not None:
        console.print(edge_note(runs))
    console.print("A much longer run may want less. The same run without the search:")
    console.print(f"  {shlex.join([*PROG.split(), *others, setting])}")
    return [*others, setting]


def _max_steps(task: Task) -> int | None:
    steps = task.settings["trainer"]["max_steps"]
    return steps if steps is not None and steps > 0 else None


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, allow_abbrev=False, add_help=False)
    parser.add_argument(OPTION, required=True)
    parser.add_argument("--lr-trials", type=int, default=5)
    parser.add_argument("--lr-steps", type=int, default=STEPS)
    parser.add_argument("--lr-metric", default="val/loss")
    parser.add_argument("--lr-jobs", type=int, default=1)
    parser.add_argument("--lr-key")
    return parser
