"""The data module for embeddings: texts that belong together, tokenized, batched and resumable."""

from lightning.pytorch.utilities import rank_zero_warn

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.fields import Row
from paca_lightning.tasks.data.mixture import OnBadRow
from paca_lightning.tasks.data.text_encoding import encode_texts
from paca_lightning.tasks.data.text_loader import TextSplit
from paca_lightning.tasks.data.text_rows import TextRows, texts_of
from paca_lightning.tasks.text_data import TextDataModule

NAMES = ("anchor", "positive", "negative")


class EmbeddingDataModule(TextDataModule):
    """Pairs of texts that belong together, perhaps with one that does not.

    They are for :class:`~paca_lightning.tasks.EmbeddingModule`. Sources are those of
    :class:`~paca_lightning.tasks.ClassificationDataModule`. All rows are kept in memory as tokens. In a batch the
    positives of other rows are negatives, so larger batches teach more.

    Args:
        tokenizer: Directory or hub id of the tokenizer; usually the model's.
        train: Source of the training rows.
        validation: Source of the validation rows. None: see `validation_fraction`.
        test: Source of the test rows, also used by `predict`. None: no test.
        columns: The columns of `anchor`, `positive` and perhaps `negative`, in this order. Default: these names;
            negatives are read if the first training row has one.
        max_length: Most tokens of a text, which is cut there.
        batch_size: Rows in a batch of each process.
        validation_fraction: Share of `train` held out if `validation` is None, drawn by `seed`. 0: no validation.
        group_by_length: Batch rows of similar length, which saves padding, and makes other rows harder negatives.
        pad_to_multiple_of: Texts are padded on the right to a multiple of this length, up to max_length.
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
        PaCAError: A number out of its range; and, from `setup`, a tokenizer, source or row that cannot be used.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | list[str],
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        columns: list[str] | None = None,
        max_length: int = 256,
        batch_size: int = 32,
        validation_fraction: float = 0.0,
        group_by_length: bool = False,
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
        self.save_hyperparameters(logger=False)
        self.check_settings()
        if columns is not None and (not 2 <= len(columns) <= 3 or len(set(columns)) < len(columns)):
            raise PaCAError(f"columns={columns!r}: name those of anchor and positive, and perhaps that of negative.")
        self._columns: list[str] | None = columns

    def encode(self, rows: TextRows, name: str) -> TextSplit:
        """The rows of a split as tokens.

        Raises:
            PaCAError: A row cannot be used.
        """
        if self._columns is None:  # of the training rows, which come first
            self._columns = list(NAMES if rows.rows and NAMES[2] in rows.rows[0] else NAMES[:2])
        rows.replace(self._read)
        rows.check(self.hparams["on_bad_row"])
        if name == "train":
            self._check_variety(rows)
        texts = {
            own: encode_texts(self.tokenizer, [(row[number],) for row in rows.rows], self.hparams["max_length"])
            for number, own in enumerate(NAMES[: len(self._columns)])
        }
        return TextSplit(rows.location, texts, dropped=len(rows.bad))

    def _read(self, row: Row) -> tuple[str, ...]:
        assert self._columns is not None
        texts = texts_of(row, self._columns)
        if len(texts) == 3 and texts[1] == texts[2]:
            raise PaCAError(f"the fields '{self._columns[1]}' and '{self._columns[2]}' are equal")
        return texts

    def _check_variety(self, rows: TextRows) -> None:
        """Refuse training rows among which there is nothing to tell apart, and name positives that come twice."""
        assert self._columns is not None
        positives = {row[1] for row in rows.rows}
        if len(self._columns) == 2 and (len(positives) < 2 or self.hparams["batch_size"] < 2):
            raise PaCAError(
                f"{rows.location}: without a column of negatives, a row is told from others of its batch: set "
                "batch_size to 2 or more, and give rows with different positives."
            )
        if twice := len(rows.rows) - len(positives):
            rank_zero_warn(
                f"{rows.location}: {twice:,} of {len(rows.rows):,} training rows have the positive of another row. In "
                "one batch, each is a wrong negative of the other: remove them, or keep one of each."
            )
