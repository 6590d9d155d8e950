"""The command line: LightningCLI for training, plain functions for the tools."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import rich
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paca_lightning.core.errors import PaCAError

RUNS = {
    "fit": "Train a model as a config says (LightningCLI).",
    "validate": "Evaluate on the validation split (LightningCLI).",
    "test": "Evaluate on the test split (LightningCLI).",
    "predict": "Run a model over a data set (LightningCLI).",
}
LOOKS = {
    "data": "Show what a config trains on: samples with the trained tokens marked, and length statistics.",
    "estimate": "Predict the memory of a config's run, without its weights and its devices.",
}
# Imported when asked for: --help and a typing mistake shall answer at once.
TOOLS = {
    "generate": ("paca_lightning.tools.generate", "Answer prompts with a model and an adapter."),
    "export": ("paca_lightning.tools.export", "Write a merged Hugging Face checkpoint or a LoRA adapter."),
    "bench": ("paca_lightning.tools.bench.bench", "Measure time and memory of PaCA against other methods."),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``paca-lightning``; exits with 0, with 1 where a budget is exceeded, 2 for a mistake, or 130 after Ctrl-C.

    Args:
        args: Command line without the program's name. Default: that of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _run(arguments)
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None or debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(mistake))}")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning saves and tears down on Ctrl-C, then exits with 1.
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(130)
        raise


def _mistake(error: BaseException | None) -> PaCAError | None:
    """The PaCAError at the root of an error: jsonargparse wraps those of a config's classes."""
    while error is not None and not isinstance(error, PaCAError):
        error = error.__cause__ or error.__context__
    return error


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
        _show_data(arguments[1:])
    elif command == "estimate":
        from paca_lightning.tools.memory import estimate

        if (code := estimate.main(arguments[1:])) != 0:
            sys.exit(code)
    elif command in RUNS:
        from paca_lightning.tools.run_config import lightning_cli

        lightning_cli(arguments, run=True)
    else:
        commands = ", ".join([*RUNS, *LOOKS, *TOOLS])
        raise PaCAError(f"{command!r} is no command. Commands: {commands}. See paca-lightning --help.")


def _run_tool(command: str, arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    module, _ = TOOLS[command]
    function: Callable[..., Any] = getattr(importlib.import_module(module), command)
    auto_cli(
        function,
        args=_as_jsonargparse_has_them(function, arguments),
        prog=f"paca-lightning {command}",
        as_positional=False,
    )


def _as_jsonargparse_has_them(function: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Options as people type them: dashes in names, beginnings of names, and switches without a value."""
    parameters = inspect.signature(function).parameters
    switches = {name for name, p in parameters.items() if isinstance(p.default, bool)}
    result = []
    for argument, following in pairwise([*arguments, "--"]):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            meant = [known for known in parameters if known.startswith(name[2:])]
            if len(meant) == 1:  # jsonargparse finds a list ambiguous, as each has a second option to append
                name = "--" + meant[0]
            if name[2:] in switches and not equals and following.startswith("-"):
                equals, value = "=", "true"
        result.append(name + equals + value)
    return result


def _show_data(arguments: list[str]) -> None:
    from paca_lightning.tools.data import data
    from paca_lightning.tools.run_config import lightning_cli

    options = argparse.ArgumentParser(
        prog="paca-lightning data",
        usage="%(prog)s --config FILE [--samples N] [whatever fit takes to override the config]",
        description=f"{LOOKS['data']} No model is loaded.",
        epilog="example: %(prog)s --config configs/quickstart.yaml --samples 5",
        allow_abbrev=False,
    )
    options.add_argument("--samples", type=int, default=3, metavar="N", help="conversations to print (default: 3)")
    known, others = options.parse_known_args(arguments)
    if known.samples < 0:
        raise PaCAError(f"--samples must not be negative, not {known.samples}.")
    data(lightning_cli(others, run=False, prog="paca-lightning data").datamodule, known.samples)


def _print_overview() -> None:
    table = Table(title="paca-lightning COMMAND --help tells more", title_justify="left", box=None, show_header=False)
    for name, purpose in (RUNS | LOOKS | {name: purpose for name, (_, purpose) in TOOLS.items()}).items():
        table.add_row(f"[bold]{name}[/]", purpose)
    rich.print(table)
    rich.print(
        "\nExample: paca-lightning fit --config configs/quickstart.yaml\n--debug shows the traceback of an error."
    )


if __name__ == "__main__":
    main()
