"""Parsers whose errors are a message and one line of help, without the list of all options."""

from typing import NoReturn

from jsonargparse import ArgumentParser
from typing_extensions import override

from paca_lightning.core.errors import PaCAError


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
        raise PaCAError(f"{message.strip()}\n{command} --help lists the options.") from ex
