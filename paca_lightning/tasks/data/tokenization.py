"""Tokenizes the conversations of a split once, and caches them as memory-mapped Arrow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import NOTHING, ChatEncoder, Encoded, Rendered
from paca_lightning.tasks.data.conversation import Conversation
from paca_lightning.tasks.data.converters import TreePaths
from paca_lightning.tasks.data.formats import Format, conversations
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.report import SplitReport, split_report
from paca_lightning.tasks.data.tokenizer import tokenizer_fingerprint

OnBadRow = Literal["error", "drop"]

_VERSION = 3  # of the cached tokens: raise it when the same rows and settings give other tokens

_CONVERSATIONS = Features(
    {
        "conversation": Value("string"),  # JSON
        "error": Value("string"),
        "format": Value("string"),
        "unread": List(Value("string")),
        "file": Value("int32"),
        "row": Value("int64"),
    }
)
_TOKENS = Features(
    {
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "length": Value("int32"),
        "trained_length": Value("int32"),
        "truncated": Value("bool"),
        "file": Value("int32"),
        "row": Value("int64"),
        "piece": Value("int32"),
        "error": Value("string"),
        "format": Value("string"),
        "unread": List(Value("string")),
        "remarks": List(Value("string")),
    }
)


@dataclass(frozen=True)
class TokenizedSplit:
    """A tokenized split.

    Args:
        name: train, validation or test.
        location: Where its rows come from, in words.
        dataset: Columns `input_ids`, `trained` (bool per token), their numbers `length` and `trained_length`,
            `truncated`, and the origin: number of the `file`, number of the `row` in it, `piece` of a raw text.
        dropped: Conversations dropped because truncation left no token to train.
        locations: The files or other parts of the source, by number.
        report: Bad rows, fields that nothing used, and what the chat template did.
    """

    name: str
    location: str
    dataset: Dataset
    dropped: int
    locations: tuple[str, ...]
    report: SplitReport = field(default_factory=SplitReport)

    def column(self, name: str) -> np.ndarray:
        """A column with one number per conversation, such as `length`."""
        return np.asarray(self.dataset.select_columns(name).with_format("numpy")[:][name])

    def files(self) -> list[str]:
        """The file of each conversation."""
        return [self.locations[number] for number in self.column("file")]

    def select(self, keep: np.ndarray) -> "TokenizedSplit":
        """The conversations for which `keep` (conversations,) is True."""
        return replace(self, dataset=self.dataset.select(np.flatnonzero(keep), keep_in_memory=True))

    def describe(self) -> str:
        """How many conversations there are, and how many were cut or dropped, as a sentence."""
        truncated = int(self.column("truncated").sum())
        return (
            f"{self.name}: {len(self.dataset):,} conversations from {self.location} ({truncated:,} cut to max_length; "
            f"{self.dropped:,} dropped, as nothing of an answer was left of them)"
        )


def tokenize(
    name: str,
    sources: Sequence[Source],
    encoder: ChatEncoder,
    *,
    format: Format,
    text_column: str,
    tree_paths: TreePaths,
    rows: slice = slice(None),
    on_bad_row: OnBadRow = "error",
) -> TokenizedSplit:
    """Read, convert and tokenize a split, or load it from the cache if no file and no setting has changed.

    Rows stream through `datasets` in batches, so memory is bounded for any number of rows.

    Args:
        name: Name of the split.
        sources: The files of the split; at least one.
        encoder: Tokenizes the conversations.
        format: Format of the rows, see `formats`.
        text_column: The field of `guanaco` and `text` rows.
        tree_paths: Which paths to take through message trees.
        rows: Which rows to take, counted from 0 over all sources.
        on_bad_row: What to do with rows that cannot be used: raise an "error" that lists them, or "drop" them.

    Raises:
        PaCAError: A source or row cannot be used, or no conversation has a token to train.
    """
    locations = tuple(source.location for source in sources)
    location = locations[0] if len(locations) == 1 else f"{len(locations)} files ({locations[0]}, ...)"
    part = (rows.start, rows.stop)
    settings = [_VERSION, *(source.fingerprint() for source in sources), format, text_column, tree_paths, part]
    raw = _cached_conversations(
        sources,
        Hasher.hash(settings),
        partial(conversations, format=format, text_column=text_column, tree_paths=tree_paths),
        rows,
    )
    settings = [*settings, tokenizer_fingerprint(encoder.tokenizer), encoder.max_length, encoder.loss_on]
    tokens = raw.map(
        partial(_encode_batch, encoder=encoder, locations=locations),
        batched=True,
        remove_columns=raw.column_names,
        features=_TOKENS,
        new_fingerprint=Hasher.hash(settings),
        desc=f"Tokenizing {name}",
    )
    report = split_report(tokens, locations, encoder.tokenizer)
    bad = len(report.bad_rows)
    if bad and (on_bad_row == "error" or bad == len(tokens) == len(raw)):
        raise PaCAError(report.bad_row_list(location))
    split = TokenizedSplit(name, location, _good_rows(tokens) if bad else tokens, 0, locations, report)
    if not len(split.dataset):
        raise PaCAError(
            f"{location}: none of the {len(raw) - bad:,} conversations keeps a token to train within max_length "
            f"{encoder.max_length}. Raise max_length, or look at the data with `paca-lightning data`."
        )
    return replace(split, dropped=len(raw) - bad - int((split.column("piece") == 0).sum()))


def _good_rows(tokens: Dataset) -> Dataset:
    """The tokenized conversations without the rows that cannot be used."""
    errors = tokens.select_columns("error").with_format("arrow")[:].column("error")
    return tokens.select(np.flatnonzero(errors.is_null().to_numpy()))


def _cached_conversations(sources: Sequence[Source], fingerprint: str, convert: Any, rows: slice) -> Dataset:
    def generate() -> Iterator[dict[str, Any]]:
        taken = islice(((i, pair) for i, source in enumerate(sources) for pair in source.read()), rows.start, rows.stop)
        first = next(taken, None)
        if first is None:
            raise PaCAError(f"{sources[0].location}: has no rows from {rows.start or 0} on. Correct the split's slice.")
        for file, pairs in groupby(chain([first], taken), key=itemgetter(0)):
            for row, found in convert((pair for _, pair in pairs), name=sources[file].location):
                good = isinstance(found, Conversation)
                yield {
                    "conversation": found.to_json() if good else None,
                    "error": None if good else str(found),
                    "format": found.format if good else None,
                    "unread": list(found.unread) if good else [],
                    "file": file,
                    "row": row,
                }

    try:
        return Dataset.from_generator(
            generate, features=_CONVERSATIONS, cache_dir=sources[0].cache_dir, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, PaCAError):
            raise error.__cause__ from None
        raise


def _encode_batch(batch: dict[str, list[Any]], encoder: ChatEncoder, locations: Sequence[str]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in _TOKENS}

    def add(i: int, piece: Encoded, number: int = 0, **others: Any) -> None:
        values = {
            "input_ids": piece.input_ids,
            "trained": piece.trained,
            "length": len(piece.input_ids),
            "trained_length": piece.trained.sum(),
            "truncated": piece.truncated,
            "file": batch["file"][i],
            "row": batch["row"][i],
            "piece": number,
            "format": batch["format"][i],
            **others,
        }
        for name, column in columns.items():
            column.append(values.get(name))

    rendered: dict[int, tuple[Conversation, Rendered]] = {}
    for i, (text, error) in enumerate(zip(batch["conversation"], batch["error"], strict=True)):
        if error is None:
            conversation = Conversation.from_json(text)
            try:
                rendered[i] = conversation, encoder.spans(conversation)
                continue
            except PaCAError as mistake:
                error = f"{locations[batch['file'][i]]}, row {batch['row'][i]}: {mistake}."
        add(i, NOTHING, error=error, unread=[], remarks=[])
    for (i, (conversation, one)), encoded in zip(
        rendered.items(), encoder.encode([one for _, one in rendered.values()]), strict=True
    ):
        pieces = encoded.split(encoder.max_length) if conversation.is_text else [encoded.cut(encoder.max_length)]
        for number, piece in enumerate(pieces):
            if piece.trained.any():
                add(i, piece, number, unread=[*batch["unread"][i], *one.unread], remarks=list(one.remarks))
    return columns
