"""The data module for heads over labels: texts or words with labels, tokenized, batched and resumable."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.fields import Row
from paca_lightning.tasks.data.label_names import found_names, label_number, number_label, several_labels
from paca_lightning.tasks.data.mixture import OnBadRow
from paca_lightning.tasks.data.text_batch import TextBatch
from paca_lightning.tasks.data.text_encoding import encode_texts, encode_words
from paca_lightning.tasks.data.text_loader import TextSplit
from paca_lightning.tasks.data.text_rows import TextRows, texts_of, value_of, words_of
from paca_lightning.tasks.new_heads import HeadTask
from paca_lightning.tasks.text_data import TextDataModule

LABEL_COLUMNS = {"sequence": "label", "regression": "label", "multi_label": "labels", "tokens": "ner_tags"}
TEXT_COLUMNS = (["text"], ["sentence1", "sentence2"], ["sentence"], ["premise", "hypothesis"])
"""Columns of texts that are looked for, if none are named."""


class ClassificationDataModule(TextDataModule):
    """Texts with labels for :class:`~paca_lightning.tasks.ClassifierModule`, which takes task and labels from here.

    A source is a local file (JSON list, JSON Lines, CSV, TSV or Parquet), several of them (a list, a directory, or a
    pattern), a directory written by `datasets`' `save_to_disk`, or a data set id on the Hugging Face hub. All rows are
    kept in memory as tokens.

    Args:
        tokenizer: Directory or hub id of the tokenizer; usually the model's.
        train: Source of the training rows.
        validation: Source of the validation rows. None: see `validation_fraction`.
        test: Source of the test rows, also used by `predict`. None: no test.
        task: `sequence`: one label for a text. `tokens`: one for each word, at the word's first token. `multi_label`: a
            list of labels, which may be empty. `regression`: a number.
        text_columns: One or two columns with the texts; two are read as a pair. Default: `text`, or else `sentence1`
            and `sentence2`, `sentence`, or `premise` and `hypothesis`; for `tokens` the column `tokens`.
        label_column: Column with the label. Default: `label`; for `multi_label` `labels`, for `tokens` `ner_tags`.
        labels: Names of the labels in the order of their numbers. Default: those of the training rows, in the order of
            the alphabet; labels that are whole numbers are taken as such.
        max_length: Most tokens of a row, which is cut there.
        batch_size: Rows in a batch of each process.
        validation_fraction: Share of `train` held out if `validation` is None, drawn by `seed`. 0: no validation.
        group_by_length: Batch rows of similar length, which saves padding.
        pad_to_multiple_of: Rows are padded on the right to a multiple of this length, up to max_length.
        num_workers: Processes that prepare batches ahead.
        seed: Seed of the validation split and of the order of batches.
        revision: Branch, tag or commit of the tokenizer on the hub.
        trust_remote_code: Whether to run code that comes with the tokenizer.
        cache_dir: Directory of downloads. None: the cache of `datasets`.
        subset: Configuration name of a hub data set.
        train_split: Split of the hub id or saved DatasetDict given as `train`.
        validation_split: Split of the one given as `validation`.
        test_split: Split of the one given as `test`.
        on_bad_row: What to do if rows cannot be used: raise an `error` that lists them, or `drop` and count them.

    Raises:
        PaCAError: A number out of its range; and, from `setup`, a tokenizer, source or row that cannot be used, a label
            of no training row, or training rows that all have the same label.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | list[str],
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        task: HeadTask = "sequence",
        text_columns: list[str] | None = None,
        label_column: str | None = None,
        labels: list[str] | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        validation_fraction: float = 0.0,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        subset: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        on_bad_row: OnBadRow = "error",
    ) -> None:
        super().__init__()
        # Not logged: Lightning refuses a name that the module has with another value, such as a task taken from here.
        self.save_hyperparameters(logger=False)
        self.check_settings()
        if task not in LABEL_COLUMNS:
            raise PaCAError(f"task={task!r} is unknown. Choose one of {list(LABEL_COLUMNS)}.")
        if text_columns is not None and not 1 <= len(text_columns) <= (1 if task == "tokens" else 2):
            raise PaCAError(f"text_columns={text_columns!r}: name one column, or the two of a pair of texts.")
        if labels is not None and (len(set(labels)) < max(2, len(labels)) or task == "regression"):
            raise PaCAError(f"labels={labels!r}: name at least two, each once; a regression has none.")
        self.labels: list[str] | None = labels

    @property
    def task(self) -> HeadTask:
        """The task."""
        task: HeadTask = self.hparams["task"]
        return task

    def encode(self, rows: TextRows, name: str) -> TextSplit:
        """The rows of a split as tokens and labels.

        Raises:
            PaCAError: A row cannot be used.
        """
        rows.replace(self._read)
        rows.check(self.hparams["on_bad_row"])  # before labels are looked at, which bad rows may lack
        if name == "train" and self.task != "regression" and self.labels is None:
            self.labels = self._names(rows)
        rows.replace(self._numbered)
        rows.check(self.hparams["on_bad_row"])
        texts, labels = zip(*rows.rows, strict=True)
        if name == "train":
            self._check_variety(rows.location, labels)
        limit, dropped = self.hparams["max_length"], len(rows.bad)
        if self.task == "tokens":
            encoded = encode_words(self.tokenizer, texts, labels, limit)
            return TextSplit(rows.location, {"": encoded}, encoded.labels, dropped=dropped)
        dtype = np.int64 if self.task == "sequence" else np.float32
        encoded = encode_texts(self.tokenizer, texts, limit)
        return TextSplit(rows.location, {"": encoded}, np.array(labels, dtype), dropped=dropped)

    @staticmethod
    def collate(batch: dict[str, dict[str, Tensor]]) -> TextBatch:
        """The inputs and labels of a batch."""
        return batch[""]

    def _read(self, row: Row) -> tuple[Any, Any]:
        """The text or words of a row, and its label as it stands there."""
        columns = self.hparams["text_columns"]
        label = value_of(row, self.hparams["label_column"] or LABEL_COLUMNS[self.task])
        if self.task == "tokens":
            words = words_of(row, columns[0] if columns else "tokens")
            if not isinstance(label, list) or len(label) != len(words):
                count = f"{len(label)}" if isinstance(label, list) else "no list of"
                raise PaCAError(f"the row has {len(words)} words and {count} labels")
            return words, label
        if columns is None:
            columns = next((known for known in TEXT_COLUMNS if known[0] in row), None)
        if columns is None:
            known = " or ".join(repr(names[0]) for names in TEXT_COLUMNS)
            raise PaCAError(f"the field {known} is missing; the row has {', '.join(map(repr, row))}: set text_columns")
        return texts_of(row, columns), label

    def _numbered(self, read: tuple[Any, Any]) -> tuple[Any, Any]:
        """What ``_read`` gave, with the label as numbers."""
        texts, label = read
        if self.task == "regression":
            return texts, number_label(label)
        assert self.labels is not None
        if self.task == "multi_label":
            return texts, several_labels(label, self.labels)
        if self.task == "tokens":
            return texts, [label_number(one, self.labels) for one in label]
        return texts, label_number(label, self.labels)

    def _names(self, rows: TextRows) -> list[str]:
        """The names of the labels of training rows."""
        several = self.task != "sequence"
        labels = [one for _, label in rows.rows for one in (label if several and isinstance(label, list) else [label])]
        try:
            return found_names(labels)
        except PaCAError as error:
            raise PaCAError(f"{rows.location}: {error}") from error

    def _check_variety(self, location: str, labels: Sequence[Any]) -> None:
        """Refuse training rows that are all alike, and name labels that none of them has."""
        found: list[Any]
        if self.task == "regression":
            found = sorted(set(labels))
        else:
            assert self.labels is not None
            counts = self._counts(labels)
            found = [name for name, count in zip(self.labels, counts, strict=True) if count]
            if missing := [name for name in self.labels if name not in found]:
                rank_zero_warn(f"{location}: no training row has the label {', '.join(map(repr, missing[:10]))}.")
        if len(found) < 2:
            raise PaCAError(
                f"{location}: the training rows have {f'one label alone, {found[0]!r}' if found else 'no label'}, so "
                "there is nothing to tell apart. Add rows of another label."
            )

    def _counts(self, labels: Sequence[Any]) -> np.ndarray:
        """How often the training rows have each label."""
        assert self.labels is not None
        if self.task == "multi_label":
            return np.sum(labels, axis=0)
        flat = labels if self.task == "sequence" else [one for row in labels for one in row]
        return np.bincount(flat, minlength=len(self.labels))
