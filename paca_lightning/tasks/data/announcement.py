"""Tells the user what was read of a split, what was not, and what the chat template did to it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.locations import skipped
from paca_lightning.tasks.data.split import TokenizedSplit


def announce(name: str, split: TokenizedSplit, settings: Mapping[str, Any], shares: Iterable[str] = ()) -> None:
    """Log what became of the rows of a split, and warn of what the chat template did.

    Args:
        name: train, validation or test.
        split: The split.
        settings: Those of the data module.
        shares: Sentences on the share of each source.

    Raises:
        PaCAError: If the template did something, with `strict_template`.
    """
    rank_zero_info(split.describe())
    named = settings[f"{name}_split"].partition("[")[0]
    if all(Path(location).is_file() for location in split.locations) and named not in (name, ""):
        rank_zero_info(f"{name}: {name}_split {named!r} names no split, as the data are files.")
    for sentence in (*skipped(settings[name]), *split.report.describe_unused(), *shares):
        rank_zero_info(f"{name}: {sentence}")
    for sentence in split.report.describe_template():
        if settings["strict_template"]:
            raise PaCAError(f"{name}: {sentence}\nSet `chat_template` to another one, or strict_template: false.")
        rank_zero_warn(f"{name}: {sentence}")
