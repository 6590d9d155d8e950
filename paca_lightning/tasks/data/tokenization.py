"""Tokenizes the conversations of a split once, and caches them as memory-mapped Arrow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import ChatEncoder
from paca_lightning.tasks.data.conversation import Conversation, is_text
from paca_lightning.tasks.data.converters import TreePaths
from paca_lightning.tasks.data.formats import Format, conversations
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.tokenizer import tokenizer_fingerprint

_VERSION = 2  # of the cached tokens: raise it when the same rows and settings give other tokens

_CONVERSATIONS = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
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
    """

    name: str
    location: str
    dataset: Dataset
    dropped: int
    locations: tuple[str, ...]

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

    Raises:
        PaCAError: A source or row cannot be used, or no conversation has a token to train.
    """
    locations = tuple(source.location for source in sources)
    location = locations[0] if len(locations) == 1 else f"{len(locations)} files ({locations[0]}, ...)"
    settings = [_VERSION, *(source.fingerprint() for source in sources), format, text_column, tree_paths]
    raw = _cached_conversations(
        sources,
        Hasher.hash(settings),
        partial(conversations, format=format, text_column=text_column, tree_paths=tree_paths),
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
    split = TokenizedSplit(name, location, tokens, 0, locations)
    if not len(tokens):
        raise PaCAError(
            f"{location}: none of the {len(raw):,} conversations keeps a token to train within max_length "
            f"{encoder.max_length}. Raise max_length, or look at the data with `paca-lightning data`."
        )
    return replace(split, dropped=len(raw) - int((split.column("piece") == 0).sum()))


def _cached_conversations(sources: Sequence[Source], fingerprint: str, convert: Any) -> Dataset:
    def generate() -> Iterator[dict[str, Any]]:
        for file, source in enumerate(sources):
            for row, messages in convert(source.rows(), name=source.location):
                yield {"messages": messages, "file": file, "row": row}

    try:
        return Dataset.from_generator(
            generate, features=_CONVERSATIONS, cache_dir=sources[0].cache_dir, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, PaCAError):
            raise error.__cause__ from None
        raise


def _encode_batch(batch: dict[str, list[Any]], encoder: ChatEncoder, locations: Sequence[str]) -> dict[str, list[Any]]:
    rendered = []
    for file, row, messages in zip(batch["file"], batch["row"], batch["messages"], strict=True):
        rendered.append(_spans(encoder, messages, f"{locations[file]}, row {row}"))
    columns: dict[str, list[Any]] = {name: [] for name in _TOKENS}
    for i, encoded in enumerate(encoder.encode(rendered)):
        pieces = (
            encoded.split(encoder.max_length) if is_text(batch["messages"][i]) else [encoded.cut(encoder.max_length)]
        )
        for number, piece in enumerate(pieces):
            if not piece.trained.any():
                continue
            columns["input_ids"].append(piece.input_ids)
            columns["trained"].append(piece.trained)
            columns["length"].append(len(piece.input_ids))
            columns["trained_length"].append(piece.trained.sum())
            columns["truncated"].append(piece.truncated)
            columns["file"].append(batch["file"][i])
            columns["row"].append(batch["row"][i])
            columns["piece"].append(number)
    return columns


def _spans(encoder: ChatEncoder, messages: Conversation, where: str) -> tuple[str, list[tuple[int, int]]]:
    try:
        return encoder.spans(messages)
    except PaCAError as error:
        raise PaCAError(f"{where}: {error}.") from error
