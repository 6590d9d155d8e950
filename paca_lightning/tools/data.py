"""Shows what a data module trains on: decoded samples with the trained tokens marked, and length statistics."""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.decode import decoded_runs
from paca_lightning.tasks.data.split import TokenizedSplit
from paca_lightning.tasks.data.stream_loader import StreamLoader
from paca_lightning.tasks.instruction import InstructionDataModule

_PERCENTILES = (50, 90, 99)


def data(datamodule: InstructionDataModule, samples: int = 3) -> None:
    """Print length statistics of every split and some decoded training samples. No model is loaded.

    Args:
        datamodule: The data to show.
        samples: How many conversations of the training split to print, from the first on. Trained tokens stand in ⟦ ⟧.

    Raises:
        PaCAError: If the data cannot be used, or the data module is of another class.
    """
    if not isinstance(datamodule, InstructionDataModule):
        raise PaCAError(
            f"The data command shows an InstructionDataModule, but the config's data is {type(datamodule).__name__}."
        )
    datamodule.prepare_data()
    datamodule.setup()
    console = Console()
    console.print(_statistics(datamodule))
    for name, split in datamodule.splits.items():
        for sentence in (*split.report.describe_unused(), *split.report.describe_template()):
            console.print(Text(f"{name}: {sentence}"))
    train = datamodule.splits["train"]
    for sample in train.dataset.select(range(min(samples, len(train.dataset)))):
        console.rule(f"{train.locations[sample['file']]}, row {sample['row']}: {sample['length']} tokens")
        console.print(marked(datamodule.tokenizer, sample["input_ids"], sample["trained"]))
    console.rule()
    console.print("Trained tokens stand in ⟦ ⟧, the others are context.")


def marked(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], trained: list[bool]) -> Text:
    """Decode tokens to text in which trained tokens stand in ⟦ ⟧, green on a terminal."""
    text = Text()
    for part, on in decoded_runs(tokenizer, input_ids, trained):
        text.append(*((f"⟦{part}⟧", "bold green") if on else (part,)))
    return text


def _batches(loader: Any) -> str:
    return "streamed" if isinstance(loader, StreamLoader) else f"{len(loader):,}"


def _statistics(datamodule: InstructionDataModule) -> Table:
    loaders = {
        "train": datamodule.train_dataloader,
        "validation": datamodule.val_dataloader,
        "test": datamodule.test_dataloader,
    }
    columns = {
        name: {**_length_statistics(split), "batches in an epoch": _batches(loaders[name]())}
        for name, split in datamodule.splits.items()
    }
    table = Table("", title="Conversations and their tokens")
    for name in columns:
        table.add_column(name, justify="right")
    for label in columns["train"]:
        table.add_row(label, *(column[label] for column in columns.values()))
    return table


def _length_statistics(split: TokenizedSplit) -> dict[str, str]:
    lengths = split.column("length")
    percentiles = np.percentile(lengths, _PERCENTILES)
    rows = len(set(zip(split.column("file").tolist(), split.column("row").tolist(), strict=True)))
    return {
        "formats": ", ".join(split.report.formats) or "-",
        "rows": f"{rows:,}",
        "bad rows dropped": f"{len(split.report.bad_rows):,}",
        "conversations": f"{len(lengths):,}",
        "cut to max_length": f"{split.column('truncated').sum():,}",
        "dropped, no answer left": f"{split.dropped:,}",
        "tokens": f"{lengths.sum():,}",
        "trained tokens": f"{split.column('trained_length').sum():,}",
        "of them trained": f"{split.column('trained_length').sum() / lengths.sum():.0%}",
        "mean length": f"{lengths.mean():.1f}",
        **{f"{rank}% are at most": f"{value:.0f}" for rank, value in zip(_PERCENTILES, percentiles, strict=True)},
        "longest": f"{lengths.max():,}",
    }
