"""Shows what a data module trains on: decoded samples with the trained tokens marked, and length statistics."""

import argparse
from typing import Any, get_args

import datasets
from rich.console import Console
from rich.text import Text

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.formats import Format
from paca_lightning.tasks.data.locations import skipped
from paca_lightning.tasks.data.mixture import OnBadRow
from paca_lightning.tasks.data.new_tokens import give_new_tokens
from paca_lightning.tasks.data.split import TokenizedSplit
from paca_lightning.tasks.data.stream_loader import StreamLoader
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tasks.preference_data import PreferenceDataModule
from paca_lightning.tasks.text_data import TextDataModule
from paca_lightning.tools.marked_text import marked, shortened
from paca_lightning.tools.run_config import lightning_cli
from paca_lightning.tools.short_errors import PlainShortErrors
from paca_lightning.tools.split_table import describe_lengths, split_table
from paca_lightning.tools.text_data import show_texts

_SENTENCES = 600  # characters of all sentences on the chat template, when shortened


def main(arguments: list[str]) -> None:
    """Run ``paca-lightning data``: for files and a tokenizer, or for a config.

    Args:
        arguments: Command line after the command's name.

    Raises:
        PaCAError: If an option is wrong, or the data cannot be used.
    """
    of_config = any(argument.startswith(("--config", "--data")) for argument in arguments)
    parser = PlainShortErrors(
        prog="paca-lightning data",
        usage="%(prog)s FILE ... --model DIRECTORY [options]\n"
        "       paca-lightning data --config FILE [options] [whatever fit takes to override the config]",
        description="Show what training reads from files: rows, formats, tokens, fields that are not used, what the "
        "chat template did, and samples with the trained tokens in ⟦ ⟧. No model is loaded.",
        epilog="examples:\n  %(prog)s chats.jsonl --model models/SmolLM2-135M-Instruct\n"
        "  %(prog)s --config configs/quickstart.yaml --samples 5 --full",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="samples to print (default: 2)")
    parser.add_argument("--full", action="store_true", help="print samples and remarks whole, not shortened")
    if not of_config:
        parser.add_argument("files", nargs="+", metavar="FILE", help="file, directory, pattern or hub id")
        parser.add_argument("--model", required=True, metavar="DIRECTORY", help="model, or tokenizer, whose template")
        formats = get_args(Format)
        help_of_format = f"one of {', '.join(formats)} (default: auto)"
        parser.add_argument("--format", default="auto", choices=formats, metavar="NAME", help=help_of_format)
        parser.add_argument("--preferences", action="store_true", help="pairs of answers, or answers with a label")
        parser.add_argument("--max_length", type=int, default=512, metavar="N", help="tokens kept (default: 512)")
        parser.add_argument("--on_bad_row", default="error", choices=get_args(OnBadRow), help="default: error")
    known, others = parser.parse_known_args(arguments)
    if known.samples < 0:
        raise PaCAError(f"--samples must not be negative, not {known.samples}.")
    if of_config:
        cli = lightning_cli(others, run=False, prog=parser.prog)
        give_new_tokens(cli.datamodule, getattr(cli.model, "new_tokens", ()))
        data(cli.datamodule, known.samples, known.full)
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    datasets.disable_progress_bars()
    settings = {name: getattr(known, name) for name in ("format", "max_length", "on_bad_row")}
    of_files = (PreferenceDataModule if known.preferences else InstructionDataModule)(
        known.model, known.files, **settings
    )
    of_files.setup()
    _show(of_files, known.samples, known.full)


def data(datamodule: InstructionDataModule | TextDataModule, samples: int = 2, full: bool = True) -> None:
    """Print statistics of every split and some decoded training samples. No model is loaded.

    Args:
        datamodule: The data to show.
        samples: How many rows of the training split to print, from the first on. Trained tokens stand in ⟦ ⟧.
        full: Print samples and remarks whole; otherwise shortened to fit one screen.

    Raises:
        PaCAError: If the data cannot be used, or the data module is of another class.
    """
    if not isinstance(datamodule, InstructionDataModule | TextDataModule):
        raise PaCAError(
            "The data command shows the package's own data modules (InstructionDataModule, PreferenceDataModule, "
            f"ClassificationDataModule, EmbeddingDataModule), but the config's data is {type(datamodule).__name__}."
        )
    datamodule.prepare_data()
    datamodule.setup()
    if isinstance(datamodule, TextDataModule):
        show_texts(datamodule, Console(), samples, full)
    else:
        _show(datamodule, samples, full)


def _show(datamodule: InstructionDataModule, samples: int, full: bool) -> None:
    console = Console()
    console.print(split_table(datamodule, "Conversations and their tokens", _statistics))
    for name, split in datamodule.splits.items():
        remarks = split.report.describe_template()
        limit = max(200, _SENTENCES // max(1, len(remarks)))
        for sentence in (*skipped(datamodule.hparams[name] or ()), *split.report.describe_unused(), *remarks):
            console.print(Text(f"{name}: {sentence if full else shortened(sentence, limit)}"))
    train = datamodule.splits["train"]
    for sample in train.dataset.select(range(min(samples, len(train.dataset)))):
        for name, part in _conversations(sample):
            tokens = part.stop - part.start
            console.rule(f"{train.locations[sample['file']]}, row {sample['row']}{name}: {tokens} tokens")
            console.print(marked(datamodule.tokenizer, sample["input_ids"][part], sample["trained"][part], full))
    console.rule()
    kinds = "no remarks" if not any(split.report.remarks for split in datamodule.splits.values()) else "remarks above"
    console.print(f"Chat template: {kinds}. Trained tokens stand in ⟦ ⟧, the others are context.")


def _conversations(sample: dict[str, Any]) -> list[tuple[str, slice]]:
    """The conversations of a document and what they are: of preferences, both of a pair or one with a label."""
    first, length = sample["chosen_length"], sample["length"]
    if first is None:
        return [("", slice(0, length))]
    if 0 < first < length:
        return [(", chosen", slice(0, first)), (", rejected", slice(first, length))]
    return [(", good" if first else ", bad", slice(0, length))]


def _statistics(split: TokenizedSplit, loader: Any) -> dict[str, str]:
    lengths = split.column("length")
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
        **describe_lengths(lengths),
        "batches in an epoch": "streamed" if isinstance(loader, StreamLoader) else f"{len(loader):,}",
    }
