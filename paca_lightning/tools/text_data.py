"""Shows what a data module of texts trains on: rows as the model reads them, with their labels, and statistics."""

from typing import Any

import numpy as np
from rich.console import Console

from paca_lightning.tasks.classification_data import ClassificationDataModule
from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.data.ragged import Ragged
from paca_lightning.tasks.data.text_loader import TextSplit
from paca_lightning.tasks.text_data import TextDataModule
from paca_lightning.tools.marked_text import marked
from paca_lightning.tools.split_table import describe_lengths, split_table


def show_texts(datamodule: TextDataModule, console: Console, samples: int, full: bool) -> None:
    """Print statistics of every split and some training rows.

    Args:
        datamodule: For classification or embeddings, after ``setup``.
        console: Prints.
        samples: How many training rows to print, from the first on. Words with a label stand in ⟦ ⟧.
        full: Print rows whole; otherwise shortened.
    """
    names = datamodule.labels if isinstance(datamodule, ClassificationDataModule) else None

    def column(split: TextSplit, loader: Any) -> dict[str, str]:
        return _statistics(split) | {"batches in an epoch": f"{len(loader):,}"} | _counts(split, names)

    console.print(split_table(datamodule, "Texts and their tokens", column))
    train = datamodule.splits["train"]
    for row in range(min(samples, len(train))):
        for name, texts in train.texts.items():
            ids = texts.input_ids[row]
            console.rule(f"{train.location}, training row {row + 1}{name and f', {name}'}: {len(ids)} tokens")
            console.print(marked(datamodule.tokenizer, ids.tolist(), _labelled(train, row, len(ids)), full))
        if train.labels is not None:
            console.print(f"label: {_label(train.labels[row], names)}", highlight=False, markup=False)
    console.rule()


def _statistics(split: TextSplit) -> dict[str, str]:
    lengths = np.concatenate([texts.input_ids.lengths for texts in split.texts.values()])
    return {
        "rows": f"{len(split):,}",
        "bad rows dropped": f"{split.dropped:,}",
        "texts of a row": ", ".join(filter(None, split.texts)) or "1",
        "texts cut to max_length": f"{sum(texts.truncated for texts in split.texts.values()):,}",
        "tokens": f"{lengths.sum():,}",
        "items with a loss": f"{split.items.sum():,}",
    } | describe_lengths(lengths)


def _counts(split: TextSplit, names: list[str] | None) -> dict[str, str]:
    """How often each label comes; of numbers, their range."""
    labels = split.labels
    if labels is None:
        return {}
    if names is None:
        return {"smallest and largest label": f"{np.min(np.asarray(labels)):g}, {np.max(np.asarray(labels)):g}"}
    if isinstance(labels, Ragged):
        flat = np.concatenate([labels[row] for row in range(len(labels))])
        counts = np.bincount(flat[flat != IGNORE_INDEX], minlength=len(names))
    else:
        counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(names))
    return {f"label {name!r}": f"{int(count):,}" for name, count in zip(names, counts, strict=True)}


def _labelled(split: TextSplit, row: int, length: int) -> list[bool]:
    if isinstance(split.labels, Ragged):
        return (split.labels[row] != IGNORE_INDEX).tolist()
    return [False] * length


def _label(label: Any, names: list[str] | None) -> str:
    """A row's label in words: one, several, one for each word in ⟦ ⟧, or a number."""
    if names is None:
        return f"{float(label):g}"
    if np.ndim(label) == 0:
        return names[int(label)]
    if np.asarray(label).dtype.kind == "f":
        return ", ".join(name for name, on in zip(names, label, strict=True) if on) or "none"
    return ", ".join(names[number] for number in label if number != IGNORE_INDEX)
