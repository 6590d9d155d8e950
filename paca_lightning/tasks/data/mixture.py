"""Several sources of a split: what to read of each, and in what shares they are trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np
from datasets import Dataset, concatenate_datasets

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.documents import DocumentEncoder
from paca_lightning.tasks.data.formats import Format
from paca_lightning.tasks.data.locations import check_present, locate, split_and_rows
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.report import split_report
from paca_lightning.tasks.data.split import TokenizedSplit
from paca_lightning.tasks.data.tokenization import Rows, tokenized

OnBadRow = Literal["error", "drop"]


class DataSource(TypedDict):
    """A source of a mixture.

    Attributes:
        location: As `train` of the data module.
        weight: How often its conversations come in an epoch: 2 is twice, 0.5 is half of them, drawn by the seed.
        max_samples: Most rows to take, from the first on.
        split: Split of a hub id or saved DatasetDict, also with a slice.
        subset: Configuration name of a hub data set.
        format: Format of its rows.
    """

    location: str | list[str]
    weight: NotRequired[float]
    max_samples: NotRequired[int]
    split: NotRequired[str]
    subset: NotRequired[str]
    format: NotRequired[Format]


Sources = str | DataSource | list[str | DataSource]


@dataclass(frozen=True)
class Part:
    """The rows of one source, and how often its conversations come in an epoch."""

    rows: Rows
    weight: float = 1.0


def parts_of(sources: Sources, default: dict[str, Any], name: str, cache_dir: str | None = None) -> list[Part]:
    """What to read. Plain locations of a list count as one source.

    Args:
        sources: As users give them.
        default: Settings of sources that do not have their own.
        name: Name of the split.
        cache_dir: Where `datasets` keeps downloads.

    Raises:
        PaCAError: Locations are not there, or a setting is out of range.
    """
    check_present(sources)
    entries = sources if isinstance(sources, list) else [sources]
    parts = []
    for plain, group in groupby(entries, key=lambda entry: isinstance(entry, str)):
        for entry in [{"location": list(group)}] if plain else group:
            settings: Any = default | cast(dict[str, Any], entry)
            parts.append(_part(settings, name, cache_dir))
    if not parts:
        raise PaCAError("the list of data files is empty.")
    if name != "train" and any(part.weight != 1 for part in parts):
        raise PaCAError(f"weight is a setting of training sources, but a source of `{name}` has one. Leave it out.")
    return parts


def _part(source: DataSource, name: str, cache_dir: str | None) -> Part:
    locations, split, most = locate(source["location"]), source.get("split", name), source.get("max_samples")
    weight, subset = source.get("weight", 1.0), source.get("subset")
    if weight <= 0 or (most is not None and most < 1):
        raise PaCAError(
            f"{locations[0]}: weight is {weight} and max_samples {most}, but weight must be above 0 and max_samples at "
            "least 1. Leave out a source that is not wanted."
        )

    def from_split(split: str) -> list[Source]:
        return [Source(location, split, subset, cache_dir) for location in locations]

    rows = slice(None)
    if any(Path(location).expanduser().exists() for location in locations):  # `datasets` slices those of the hub
        split, rows = split_and_rows(split, name, lambda split: sum(1 for one in from_split(split) for _ in one.read()))
    if most is not None:
        start = rows.start or 0
        rows = slice(start, start + most if rows.stop is None else min(rows.stop, start + most))
    return Part(Rows(from_split(split), source.get("format", "auto"), rows), weight)


def load_split(
    name: str,
    parts: Sequence[Part],
    encode: DocumentEncoder,
    *,
    cache_dir: str | None = None,
    num_proc: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> TokenizedSplit:
    """Tokenize the sources of a split, each of which has a cache entry of its own.

    Args:
        name: Name of the split.
        parts: The sources.
        encode: Tokenizes their rows.
        cache_dir: The cache.
        num_proc: Processes that tokenize.
        on_bad_row: What to do with rows that cannot be used: raise an "error" that lists them, or "drop" them.

    Raises:
        PaCAError: A source or row cannot be used, or no conversation has a token to train.
    """
    locations = tuple(source.location for part in parts for source in part.rows.sources)
    location = locations[0] if len(locations) == 1 else f"{len(locations)} files ({locations[0]}, ...)"
    found: list[Dataset] = []
    files = 0
    for part in parts:
        documents = tokenized(part.rows, encode, cache_dir=cache_dir, num_proc=num_proc, name=name)
        found.append(_numbered_from(files, documents))
        files += len(part.rows.sources)
    return checked_split(name, location, concatenate_datasets(found), locations, encode, on_bad_row)


def checked_split(
    name: str,
    location: str,
    documents: Dataset,
    locations: tuple[str, ...],
    encode: DocumentEncoder,
    on_bad_row: OnBadRow,
) -> TokenizedSplit:
    """The documents that have tokens, as a split with its report; `location` is where they come from, in words.

    Raises:
        PaCAError: A row cannot be used, or no conversation has a token to train.
    """
    report = split_report(documents, locations, encode.encoder.tokenizer)
    bad = len(report.bad_rows)
    if bad and (on_bad_row == "error" or report.bad_files or bad == len(documents)):
        raise PaCAError(report.bad_row_list(location))
    split = TokenizedSplit(name, location, documents, 0, locations, report)
    used = split.column("length") > 0
    if not used.any():
        raise PaCAError(
            f"{location}: none of the {len(documents) - bad:,} conversations keeps a token to train within max_length "
            f"{encode.encoder.max_length}. Raise max_length, or look at the data with `paca-lightning data`."
        )
    if used.all():
        return split
    return replace(split, dataset=documents.select(np.flatnonzero(used)), dropped=int((~used).sum()) - bad)


def _numbered_from(first: int, documents: Dataset) -> Dataset:
    """The documents of a source with the numbers that its files have among those of all sources."""
    if not first:
        return documents
    numbers = documents.with_format("numpy")["file"][:] + first
    return documents.remove_columns("file").add_column("file", numbers, feature=documents.features["file"])


def mixed(
    split: TokenizedSplit, parts: Sequence[Part], max_samples: int | None, seed: int
) -> tuple[TokenizedSplit, list[str]]:
    """The conversations of an epoch, and sentences on the share of each source.

    Args:
        split: The conversations of all sources.
        parts: The sources.
        max_samples: Most conversations of an epoch, drawn from all.
        seed: Seed of what is drawn.
    """
    if max_samples is None and all(part.weight == 1 for part in parts):
        return split, []
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([len(part.rows.sources) for part in parts])
    origins = np.searchsorted(bounds, split.column("file"), side="right")
    chosen: list[np.ndarray] = []
    for number, part in enumerate(parts):
        documents = np.flatnonzero(origins == number)
        repeats, rest = divmod(part.weight, 1)
        drawn = rng.permutation(documents)[: round(rest * len(documents))]
        chosen.append(np.concatenate([np.repeat(documents, int(repeats)), np.sort(drawn)]))
    numbers = np.concatenate(chosen)
    if max_samples is not None and max_samples < len(numbers):
        numbers = numbers[np.sort(rng.permutation(len(numbers))[:max_samples])]
    if not len(numbers):
        raise PaCAError(f"the weights of {split.location} leave no conversation. Raise them.")
    counts = np.bincount(origins[numbers], minlength=len(parts))
    sentences = [
        f"{part.rows.sources[0].location}{', ...' * (len(part.rows.sources) > 1)}: {count:,} of its "
        f"{int((origins == number).sum()):,} conversations an epoch (weight {part.weight:g}), "
        f"{count / len(numbers):.0%} of all"
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
    ]
    return split.select(numbers), sentences
