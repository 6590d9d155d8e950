"""Reads MMLU questions from the hub, the original CSV folders, saved data sets, Parquet or single files."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import looks_local, where_it_was_sought
from paca_lightning.tasks.mmlu.files import Row, read_rows
from paca_lightning.tasks.mmlu.questions import Question, check_question

SPLITS = ("auxiliary_train", "dev", "validation", "test")
_LAYOUTS = (
    "the original CSV folders (dev/anatomy_dev.csv, val/, test/), data sets saved to disk (anatomy/test/ or test/), "
    "Parquet files (anatomy/test-*.parquet, all/test-*.parquet or test-*.parquet)"
)


def read_split(source: str, split: str, subjects: Sequence[str] | None = None) -> list[Question]:
    """Read and check one split of MMLU.

    Args:
        source: A local directory in one of the known layouts, or a Hugging Face data set with the configuration
            ``all`` and a column ``subject``, such as ``cais/mmlu``.
        split: ``dev``, ``validation``, ``test`` or ``auxiliary_train``; the last has no subjects.
        subjects: Subjects to read; each must exist. Default: all subjects of the split.

    Returns:
        The questions, sorted by subject, within a subject in the order of the source.

    Raises:
        PaCAError: If the source or the split is missing or empty, or a row is malformed (file, row and field).
    """
    if split not in SPLITS:
        raise PaCAError(f"{split!r} is not a split of MMLU. Choose one of {list(SPLITS)}.")
    root = Path(source).expanduser()
    rows = _local_rows(root, split, subjects) if root.is_dir() else _hub_rows(source, split)
    questions = [check_question(where, fields) for where, fields in rows]
    if split != "auxiliary_train":
        questions = _of_subjects(questions, subjects, f"the split {split!r} of {source}")
    if not questions:
        raise PaCAError(f"The split {split!r} of {source} is empty. Choose another split or source.")
    return questions


def read_file(path: Path) -> list[Question]:
    """Read and check one file of questions (CSV, JSON, JSON Lines, Parquet) or one saved data set.

    Raises:
        PaCAError: If the file is missing, empty or of another kind, or a row is malformed.
    """
    path = path.expanduser()
    if not path.exists():
        raise PaCAError(f"{path} does not exist. Name a split ({', '.join(SPLITS)}) or a file of questions.")
    return [check_question(where, fields) for where, fields in read_rows(path)]


def _of_subjects(questions: list[Question], subjects: Sequence[str] | None, of: str) -> list[Question]:
    for question in questions:
        if question.subject is None:
            raise PaCAError(f"{question.where}: the field 'subject' is missing.")
    found = {str(question.subject) for question in questions}
    if missing := sorted(set(subjects or ()) - found):
        raise PaCAError(f"There are no questions on {missing} in {of}. Leave these subjects out, or add their files.")
    chosen = found if subjects is None else set(subjects)
    return sorted((q for q in questions if q.subject in chosen), key=lambda q: str(q.subject))


def _local_rows(root: Path, split: str, subjects: Sequence[str] | None) -> Iterator[Row]:
    parts = _parts(root, split) or _parts(root / "data", split)
    if not parts:
        raise PaCAError(f"The directory {root} has no split {split!r}. Known layouts: {_LAYOUTS}.")
    for path, subject in parts:
        if subject is None:
            yield from read_rows(path)
        elif subjects is None or subject in subjects:
            yield from ((where, {**fields, "subject": subject}) for where, fields in read_rows(path))


def _parts(root: Path, split: str) -> list[tuple[Path, str | None]]:
    """Files or saved data sets of a split, and the subject of each if its path names one."""
    short = "val" if split == "validation" else split
    layouts: dict[str, Callable[[Path], str | None]] = {
        f"*/{split}/state.json": lambda path: path.parent.parent.name,
        f"{split}/state.json": lambda path: None,
        f"{short}/*_{short}.csv": lambda path: path.stem.removesuffix(f"_{short}"),
        f"all/{split}-*.parquet": lambda path: None,
        f"*/{split}-*.parquet": lambda path: path.parent.name,
        f"*/{split}.parquet": lambda path: path.parent.name,
        f"{split}-*.parquet": lambda path: None,
        f"{split}.parquet": lambda path: None,
    }
    if split == "auxiliary_train":
        layouts = {"auxiliary_train/*.csv": lambda path: None, "auxiliary_train/*.parquet": lambda path: None} | layouts
    for pattern, subject_of in layouts.items():
        if found := sorted(root.glob(pattern)):
            return [(path.parent if path.name == "state.json" else path, subject_of(path)) for path in found]
    return []


def _hub_rows(source: str, split: str) -> Iterator[Row]:
    if looks_local(source) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        where = where_it_was_sought(source)
        raise PaCAError(
            f"The directory {source} does not exist ({where}). Known layouts: {_LAYOUTS}; or a hub id (cais/mmlu)."
        )
    try:
        rows = datasets.load_dataset(source, "all", split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise PaCAError(
            f"{source!r} is no local directory, and loading it from the Hugging Face hub failed: {error}. "
            f"Offline, set the source to a local directory: {_LAYOUTS}."
        ) from error
    for number, fields in enumerate(rows, start=1):
        yield f"{source} ({split}), row {number}", fields
