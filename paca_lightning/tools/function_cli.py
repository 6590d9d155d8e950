"""A command line for a function: one option for each of its parameters, typed the way people type options."""

import inspect
import json
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, get_args, get_type_hints

from jsonargparse import auto_cli
from typing_extensions import override

from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.short_errors import ShortErrors, settings_in


class SwitchParser(ShortErrors):
    """jsonargparse's parser, in which a boolean option needs no value: ``--compile`` means ``--compile true``."""

    @override
    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an option, one with an optional value if its default is a boolean."""
        if isinstance(kwargs.get("default"), bool):
            kwargs |= {"nargs": "?", "const": True}
        return super().add_argument(*args, **kwargs)

    @override
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse a config of the options.

        Raises:
            PaCAError: If it is the config of a run.
        """
        if isinstance(run := settings_in(content).get("model"), dict):
            model = (run.get("init_args") or run).get("model", "DIRECTORY")
            raise PaCAError(
                f"--config holds options of {self.prog}, and this one is the config of a run. Give what is needed of "
                f"it: --model {model}, and the run's adapter directory or checkpoint as --adapter if there is such an "
                "option."
            )
        return super().parse_string(content, *args, **kwargs)


def run_function(function: Callable[..., Any], arguments: Sequence[str], *, prog: str, example: str) -> None:
    """Call a function with the options of a command line; ``--help`` shows its docstring.

    Args:
        function: Its type hints say what an option takes, its docstring what it means.
        arguments: Options. Names may have dashes for underscores and may be abbreviated.
        prog: The command, for messages.
        example: A complete command line, shown at the end of the help.

    Raises:
        PaCAError: If an option is unknown, missing or of another type.
        SystemExit: With 0 after ``--help``.
    """
    auto_cli(
        function,
        args=with_lists(function, full_names(function, arguments)),
        as_positional=False,
        parser_class=SwitchParser,
        prog=prog,
        epilog=f"example: {example}",
        allow_abbrev=True,
    )


def full_names(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """The arguments with option names as the function spells its parameters; see docs/decisions/0012.

    Args:
        function: The function that the options are for.
        arguments: A command line. Values, and names that are ambiguous or unknown, stay for the parser to judge.
    """
    parameters = list(inspect.signature(function).parameters)
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            typed = name[2:].replace("-", "_")
            matching = [parameter for parameter in parameters if parameter.startswith(typed)]
            name = "--" + (matching[0] if len(matching) == 1 else typed)
        result.append(name + equals + value)
    return result


def with_lists(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """The arguments with several values of a list, ``--adapter A B``, as the one value that jsonargparse reads.

    Args:
        function: The function that the options are for.
        arguments: A command line with full names.
    """
    hints = get_type_hints(function)
    lists = {f"--{name}" for name, hint in hints.items() if list[str] in (hint, *get_args(hint))}
    result: list[str] = []
    rest = list(arguments)
    while rest:
        result.append(rest.pop(0))
        values = list(takewhile(lambda each: not each.startswith("--"), rest if result[-1] in lists else []))
        if len(values) > 1:
            result.append(json.dumps(values))
            del rest[: len(values)]
    return result
