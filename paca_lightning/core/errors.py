"""PaCAError, and what its messages are made of."""

import difflib
from collections.abc import Iterable


class PaCAError(ValueError):
    """A mistake that the user can correct: in the configuration, the model, the data or the environment.

    It is raised before training starts, unless it cannot be known by then. The message says what is wrong, where
    (module path, or file and row), and what to do about it.
    """


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar one that there is, or nothing."""
    similar = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {similar[0]!r}?" if similar else ""


def users_mistake(error: BaseException | None) -> PaCAError | None:
    """The PaCAError that an error is or was raised from, as jsonargparse raises errors of a config's classes.

    An error that came up while a PaCAError was handled (its ``__context__``) is another error, and is shown as it is.
    """
    while error is not None and not isinstance(error, PaCAError):
        error = error.__cause__
    return error


def first_message(error: BaseException) -> str:
    """The message of the error that was raised first: others put theirs around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip()


def raised_by(error: BaseException) -> str:
    """Name of the module whose code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
