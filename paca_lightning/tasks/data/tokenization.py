"""A split's conversations, tokenized once and kept on disk as memory-mapped Arrow."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from paca_lightning.errors import PaCAError
from paca_lightning.tasks.data.chat import ChatEncoder
from paca_lightning.tasks.data.formats import Conversation, Format, TreePaths, conversations
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.tokenizer import tokenizer_fingerprint

_VERSION = 1  # of what is cached: raise it when the same rows and settings come to give other tokens

_CONVERSATIONS = Features(
    {"messages": List({"role": Value("string"), "content": Value("string")}), "row": Value("int64")}
)
_TOKENS = Features(
    {
        "input_ids": List(Value("int32")),
        "trained": List(Value("bool")),
        "length": Value("int32"),
        "trained_length": Value("int32"),
        "truncated": Value("bool"),
        "row": Value("int64"),
    }
)


@dataclass(frozen=True)
class TokenizedSplit:
    """A tokenized split.

    Args:
        name: train, validation or test.
        location: Where its rows came from.
        dataset: `input_ids`, `trained` (whether each is), their numbers `length` and `trained_length`, `truncated`,
            and the source's `row` number.
        dropped: Conversations left out because truncation left them no token to train.
    """

    name: str
    location: str
    dataset: Dataset
    dropped: int

    def column(self, name: str) -> np.ndarray:
        """Return one number per conversation, such as `length`, as an array."""
        return np.asarray(self.dataset.select_columns(name).with_format("numpy")[:][name])

    def select(self, keep: np.ndarray) -> "TokenizedSplit":
        """Return the split with some of its conversations; `keep` (conversations,) bool says which."""
        return replace(self, dataset=self.dataset.select(np.flatnonzero(keep), keep_in_memory=True))

    def describe(self) -> str:
        """One sentence: how many conversations there are, and how many were cut or dropped."""
        truncated = int(self.column("truncated").sum())
        return (
            f"{self.name}: {len(self.dataset):,} conversations from {self.location} ({truncated:,} cut to max_length; "
            f"{self.dropped:,} dropped, as nothing of an answer was left of them)"
        )


def tokenize(
    name: str, source: Source, encoder: ChatEncoder, *, format: Format, text_column: str, tree_paths: TreePaths
) -> TokenizedSplit:
    """Read, convert and tokenize a split, or load it from the cache if neither its file nor a setting changed.

    Rows stream through `datasets` in batches, so that memory stays bounded whatever the number of rows.

    Args:
        name: The split's name.
        source: Its rows.
        encoder: Turns conversations into tokens.
        format: See `formats`; as are `text_column` and `tree_paths`.
        text_column: The field of `guanaco` text.
        tree_paths: Which paths to take through message trees.

    Raises:
        PaCAError: A source or row that cannot be used, or a split of which nothing is left.
    """
    settings = [_VERSION, source.fingerprint(), format, text_column, tree_paths]
    raw = _cached_conversations(
        source,
        Hasher.hash(settings),
        partial(conversations, name=source.location, format=format, text_column=text_column, tree_paths=tree_paths),
    )
    settings = [*settings, tokenizer_fingerprint(encoder.tokenizer), encoder.max_length, encoder.loss_on]
    tokens = raw.map(
        partial(_encode_batch, encoder=encoder, location=source.location),
        batched=True,
        remove_columns=raw.column_names,
        features=_TOKENS,
        new_fingerprint=Hasher.hash(settings),
        desc=f"Tokenizing {name}",
    )
    split = TokenizedSplit(name, source.location, tokens, dropped=len(raw) - len(tokens))
    if not len(tokens):
        raise PaCAError(
            f"{source.location}: none of the {len(raw):,} conversations keeps a token to train within max_length "
            f"{encoder.max_length}. Raise max_length, or look at the data with `paca-lightning data`."
        )
    return split


def _cached_conversations(source: Source, fingerprint: str, convert: Any) -> Dataset:
    def generate() -> Iterator[dict[str, Any]]:
        for row, messages in convert(source.rows()):
            yield {"messages": messages, "row": row}

    try:
        return Dataset.from_generator(
            generate, features=_CONVERSATIONS, cache_dir=source.cache_dir, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, PaCAError):
            raise error.__cause__ from None
        raise


def _encode_batch(batch: dict[str, list[Any]], encoder: ChatEncoder, location: str) -> dict[str, list[Any]]:
    rendered = []
    for row, messages in zip(batch["row"], batch["messages"], strict=True):
        rendered.append(_spans(encoder, messages, f"{location}, row {row}"))
    columns: dict[str, list[Any]] = {name: [] for name in _TOKENS}
    for row, encoded in zip(batch["row"], encoder.encode(rendered), strict=True):
        if not encoded.trained.any():
            continue
        columns["input_ids"].append(encoded.input_ids)
        columns["trained"].append(encoded.trained)
        columns["length"].append(len(encoded.input_ids))
        columns["trained_length"].append(encoded.trained.sum())
        columns["truncated"].append(encoded.truncated)
        columns["row"].append(row)
    return columns


def _spans(encoder: ChatEncoder, messages: Conversation, where: str) -> tuple[str, list[tuple[int, int]]]:
    try:
        return encoder.spans(messages)
    except PaCAError as error:
        raise PaCAError(f"{where}: {error}.") from error
