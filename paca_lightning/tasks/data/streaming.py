"""Training data of the data module as a stream: what the settings allow, the first rows, and the loader."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from datasets import Dataset
from lightning.pytorch import Trainer

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.collate import PadCollator
from paca_lightning.tasks.data.documents import DocumentEncoder
from paca_lightning.tasks.data.formats import records
from paca_lightning.tasks.data.mixture import Part, checked_split
from paca_lightning.tasks.data.sampler import share_of
from paca_lightning.tasks.data.split import TokenizedSplit
from paca_lightning.tasks.data.stream import DocumentStream
from paca_lightning.tasks.data.stream_loader import StreamLoader
from paca_lightning.tasks.data.tokenization import document_table
from paca_lightning.tasks.data.tokenizer import pad_token_id

FIRST_ROWS = 1000
"""Rows that are read and reported before the run."""

_CONTRADICTIONS = {
    "validation_fraction": "holds out rows of all that there are; give `validation` a file",
    "max_samples": "draws from all rows; take the first ones by `train_split: train[:1000]`",
    "num_proc": "tokenizes before the run; a stream is tokenized by num_workers",
}


def check_stream_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the data module that need all rows.

    Raises:
        PaCAError: One of them is set.
    """
    for name, reason in _CONTRADICTIONS.items():
        if settings[name]:
            raise PaCAError(f"streaming: true does not go with {name}={settings[name]}, which {reason}.")


def first_rows(
    settings: Mapping[str, Any], parts: Sequence[Part], encode: DocumentEncoder, trainer: Trainer | None
) -> TokenizedSplit:
    """The first rows of the stream, with their report.

    Args:
        settings: Those of the data module.
        parts: The sources.
        encode: Tokenizes their rows.
        trainer: The trainer, if there is one.

    Raises:
        PaCAError: A source or one of these rows cannot be used or streamed, or a fit on the stream would not end.
    """
    if trainer is not None and trainer.state.fn == "fit":
        batches_of_an_epoch(trainer)
    for part in parts:
        _check_part(part, encode.text_column)
    stream = _stream(settings, parts, encode)
    documents = list(encode(list(islice(stream.records(), FIRST_ROWS))))
    locations = stream.locations()
    where = f"the first rows of {locations[0]}{', ...' * (len(locations) > 1)} (the rest is streamed)"
    return checked_split("train", where, Dataset(document_table(documents)), locations, encode, settings["on_bad_row"])


def _check_part(part: Part, text_column: str) -> None:
    for source in part.rows.sources:
        if part.weight != 1:
            raise PaCAError(f"{source.location}: weight is {part.weight}, which a stream cannot give. Leave it out.")
        rows = records(islice(source.read(), FIRST_ROWS), source.location, part.rows.format, text_column)
        first = next((record for record in rows if record.error is None), None)
        if first is not None and first.format == "oasst_messages":
            raise PaCAError(
                f"{source.location}: messages of OASST trees need all rows at once. Set streaming: false, or give "
                "whole trees (format `oasst`)."
            )


def batches_of_an_epoch(trainer: Trainer) -> int:
    """How many batches the trainer takes of a stream in an epoch.

    Raises:
        PaCAError: Nothing ends an epoch, or the trainer means to overfit some batches.
    """
    if getattr(trainer, "overfit_batches", 0):
        raise PaCAError("overfit_batches repeats batches, which a stream does not. Set streaming: false.")
    if isinstance(trainer.limit_train_batches, int):
        return trainer.limit_train_batches
    if trainer.max_steps > 0:
        return trainer.max_steps * trainer.accumulate_grad_batches
    raise PaCAError(
        "streaming: true has no end of its own. Set trainer.max_steps, or trainer.limit_train_batches to a whole "
        "number (batches of an epoch)."
    )


def stream_loader(
    settings: Mapping[str, Any], parts: Sequence[Part], encode: DocumentEncoder, trainer: Trainer | None
) -> StreamLoader:
    """The training loader over a stream; arguments as of `first_rows`."""
    return StreamLoader(
        _stream(settings, parts, encode),
        batches_of_an_epoch(trainer) if trainer is not None else 0,
        **share_of(trainer),
        num_workers=settings["num_workers"],
        trainer=trainer,
    )


def _stream(settings: Mapping[str, Any], parts: Sequence[Part], encode: DocumentEncoder) -> DocumentStream:
    """The stream that the data module's settings ask for."""
    tokenizer, packing, max_length = encode.encoder.tokenizer, settings["packing"], settings["max_length"]
    return DocumentStream(
        [part.rows for part in parts],
        encode,
        PadCollator(pad_token_id(tokenizer), settings["pad_to_multiple_of"], max_length, packing),
        settings["batch_size"],
        settings["shuffle_buffer"],
        group_by_length=settings["group_by_length"],
        pack_to=max_length if packing else None,
        seed=settings["seed"],
        drop_bad_rows=settings["on_bad_row"] == "drop",
    )
