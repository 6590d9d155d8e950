"""A table of what the splits of a data module hold."""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

PERCENTILES = (50, 90, 99, 100)
"""Of the lengths of rows that are shown."""


def split_table(datamodule: Any, title: str, column_of: Callable[[Any, Any], dict[str, str]]) -> Table:
    """A table with a column for each split.

    Args:
        datamodule: After ``setup``.
        title: Of the table.
        column_of: What a column says of a split and its loader.
    """
    loaders = {
        "train": datamodule.train_dataloader,
        "validation": datamodule.val_dataloader,
        "test": datamodule.test_dataloader,
    }
    columns = {name: column_of(split, loaders[name]()) for name, split in datamodule.splits.items()}
    table = Table("", title=title, box=box.MINIMAL, show_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    for label in columns["train"]:
        table.add_row(label, *(column[label] for column in columns.values()))
    return table


def describe_lengths(lengths: Any) -> dict[str, str]:
    """The mean and percentiles of lengths, shape (N,)."""
    percentiles = np.percentile(lengths, PERCENTILES)
    return {
        "mean length": f"{lengths.mean():.1f}",
        "length of 50, 90, 99, 100% at most": ", ".join(f"{value:.0f}" for value in percentiles),
    }
