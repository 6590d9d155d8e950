"""The command line: LightningCLI for training, plain functions for the tools."""

import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import rich
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paca_lightning.core.errors import PaCAError, did_you_mean, users_mistake


class Tool(NamedTuple):
    """A command that is a plain function of the same name.

    Attributes:
        module: Where it is. Imported when the command runs, so that ``--help`` and a mistyped command answer at once.
        purpose: For the overview.
        example: Options of a typical call.
    """

    module: str
    purpose: str
    example: str


RUNS = {
    "fit": "Train a model as a config says; --lr auto searches the learning rate first (LightningCLI).",
    "validate": "Evaluate on the validation split (LightningCLI).",
    "test": "Evaluate on the test split (LightningCLI).",
    "predict": "Run a model over a data set (LightningCLI).",
}
LOOKS = {
    "data": "Show what a file or a config trains on: samples with the trained tokens marked, and statistics.",
    "estimate": "Predict the memory of a config's run, without its weights and its devices.",
    "dynamics": "Look along a history of adapters: losses, memorization, how far columns moved.",
    "compare": "Train methods on a config's run, each at its best learning rate, and compare what they learn.",
}
TOOLS = {
    "generate": Tool(
        "paca_lightning.tools.generate",
        "Answer prompts with a model and its adapters, side by side; without prompts, chat in the terminal.",
        '--model DIRECTORY --adapter DIRECTORY --prompts "What is your name?"',
    ),
    "export": Tool(
        "paca_lightning.tools.export",
        "Write a merged Hugging Face checkpoint, a LoRA adapter, or an adapter of PEFT's PaCA.",
        "--model DIRECTORY --adapter DIRECTORY --output DIRECTORY --format merged",
    ),
    "eval": Tool(
        "paca_lightning.tools.evaluation.command",
        "Measure a model, and adapters beside it, on lm-eval's tasks.",
        "--model DIRECTORY --adapter DIRECTORY --tasks arc_easy hellaswag --limit 100",
    ),
    "bench": Tool(
        "paca_lightning.tools.bench.command",
        "Measure time and memory of PaCA against other methods.",
        "--preset small --tokens 512 --methods floor,paca:16,lora:8",
    ),
}
PURPOSES = RUNS | LOOKS | {name: tool.purpose for name, tool in TOOLS.items()}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``paca-lightning``.

    Exit codes: 0; 1 if a run does not fit the memory given to ``estimate``; 2 for a user's mistake; 130 after Ctrl-C;
    143 after SIGTERM, 129 after SIGHUP. Any other error keeps its traceback.

    Args:
        args: Command line without the program's name. Default: that of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with sigterm_exits():
            _run(arguments)
    except Exception as error:
        mistake = users_mistake(error)
        if mistake is None or debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(mistake))}")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning saves and tears down on Ctrl-C, then exits with 1.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(130)
        raise


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Inside this context SIGTERM raises SystemExit, so that what is open is closed; a run replaces this meanwhile."""

    def exit_now(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, exit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        _print_overview()
    elif command == "--version":
        from importlib.metadata import version

        print(version("paca-lightning"))
    elif command in TOOLS:
        _run_tool(command, arguments[1:])
    elif command == "data":
        from paca_lightning.tools.data import main as show_data

        show_data(arguments[1:])
    elif command == "estimate":
        from paca_lightning.tools.memory.command import main as run_estimate

        if (code := run_estimate(arguments[1:])) != 0:
            sys.exit(code)
    elif command == "compare":
        from paca_lightning.tools.compare.command import main as run_compare

        run_compare(arguments[1:])
    elif command == "dynamics":
        from paca_lightning.tools.dynamics.command import main as run_dynamics

        run_dynamics(arguments[1:])
    elif command in RUNS:
        from paca_lightning.tools.compare.auto import HELP, asks_for_search, with_learning_rate
        from paca_lightning.tools.run_config import lightning_cli

        if command == "fit" and asks_for_search(arguments):
            arguments = [command, *with_learning_rate(arguments[1:])]
        lightning_cli(arguments, run=True, fit_help=HELP)
    else:
        meant = did_you_mean(command, PURPOSES)
        raise PaCAError(
            f"{command!r} is no command.{meant} Commands: {', '.join(PURPOSES)}. See paca-lightning --help."
        )


def _run_tool(command: str, arguments: list[str]) -> None:
    from paca_lightning.tools.function_cli import run_function

    tool, prog = TOOLS[command], f"paca-lightning {command}"
    function = getattr(importlib.import_module(tool.module), command)
    run_function(function, arguments, prog=prog, example=f"{prog} {tool.example}")


def _print_overview() -> None:
    table = Table(title="paca-lightning COMMAND --help tells more", title_justify="left", box=None, show_header=False)
    for name, purpose in PURPOSES.items():
        table.add_row(f"[bold]{name}[/]", purpose)
    rich.print(table)
    rich.print(
        "\nExample: paca-lightning fit --config configs/quickstart.yaml\n--debug shows the traceback of an error."
    )


if __name__ == "__main__":
    main()
