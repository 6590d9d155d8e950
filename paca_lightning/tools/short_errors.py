"""Parsers whose errors are a message and one line of help, without the list of all options."""

import argparse
import re
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from typing_extensions import override

from paca_lightning.core.errors import PaCAError

UNION = re.compile(
    r"  Does not validate against any of the Union subtypes\n  Subtypes: .*\n  Errors:\n"
    r"((?:    - Expected an? .*\n)+)  Given value type: .*\n  Given value: (.*)"
)
"""jsonargparse's list of plain types that a value has none of."""

OF_TYPES = re.compile(
    r"\s*(?:- )?(?:Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Given value(?: type)?: |"
    r"Expected a <class 'NoneType'>$|Not a valid subclass of |Subclass types expect one of:|a class path \(str\)$|"
    r"a dict with)"
)
CALLABLE = re.compile(r"Type typing\.Callable\S*\[.*?\] expects a function or a callable class: ")
CONFIG = re.compile(r" Got value: Namespace\(.*\)$", re.MULTILINE)


class ShortErrors(ArgumentParser):
    """jsonargparse's parser, which raises what it would print below its usage."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message, and which command tells more.

        Raises:
            PaCAError: Always, but from a parser that is asked to raise jsonargparse's own error: one inside another.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        raise _mistake(message, command) from ex


def settings_in(content: str) -> dict[str, Any]:
    """What a config holds; nothing if it is none, which the parser that gets it reports with the place."""
    try:
        settings = yaml.safe_load(content)
    except yaml.YAMLError:
        return {}
    return settings if isinstance(settings, dict) else {}


class PlainShortErrors(argparse.ArgumentParser):
    """The same for the parser of the standard library."""

    @override
    def error(self, message: str) -> NoReturn:
        """Raise the message, and which command tells more.

        Raises:
            PaCAError: Always.
        """
        raise _mistake(message, self.prog)


def _mistake(message: str, command: str) -> PaCAError:
    shortened = _without_types(UNION.sub(_in_one_line, message.strip()))
    return PaCAError(f"{shortened}\n{command} --help lists the options.")


def _without_types(message: str) -> str:
    """A nested error of jsonargparse without the types that a value might have had, and whole configs as values."""
    lines = [line for line in CALLABLE.sub("", message).splitlines() if line.strip() and not OF_TYPES.match(line)]
    return CONFIG.sub("", "\n".join(lines))


def _in_one_line(found: re.Match[str]) -> str:
    expected = [line.partition("Expected a")[2].lstrip("n ") for line in found[1].splitlines()]
    return f"  Expected a {' or '.join(expected)}. Got value: {found[2]}"
