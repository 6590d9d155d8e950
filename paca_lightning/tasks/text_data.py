"""What data modules of texts share: a tokenizer, splits of rows, and loaders that resume in the middle of an epoch."""

from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.loader import ResumableLoader
from paca_lightning.tasks.data.sampler import BatchOrder, share_of
from paca_lightning.tasks.data.settings import check_held_out, check_numbers
from paca_lightning.tasks.data.text_loader import TextReader, TextSplit
from paca_lightning.tasks.data.text_rows import TextRows, read_text_rows
from paca_lightning.tasks.data.tokenizer import pad_token_id, plain_tokenizer


class TextDataModule(LightningDataModule):
    """Rows of texts as padded batches. A subclass says in ``encode`` what a row is.

    The loaders shard the rows over the processes themselves, use every row exactly once an epoch, and resume in the
    middle of an epoch. After ``setup``, ``tokenizer`` is the tokenizer and ``splits`` holds the encoded splits.
    """

    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, TextSplit]

    def check_settings(self) -> None:
        """Check the numbers among the hyperparameters.

        Raises:
            PaCAError: One is out of its range.
        """
        check_numbers(self.hparams)
        check_held_out(self.hparams)
        self.splits = {}

    def encode(self, rows: TextRows, name: str) -> TextSplit:
        """The rows of a split as tokens; rows that cannot be used are told by ``rows.check``."""
        raise NotImplementedError

    @property
    def pad_token_id(self) -> int:
        """What rows are filled up with."""
        return pad_token_id(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize the splits, once. The training rows are always read: they say which labels there are.

        Raises:
            PaCAError: The tokenizer, a source or a row cannot be used.
        """
        if self.splits:
            return
        settings = self.hparams
        self.tokenizer = plain_tokenizer(
            settings["tokenizer"], revision=settings["revision"], trust_remote_code=settings["trust_remote_code"]
        )
        rows = {name: self._rows(name) for name in ("train", "validation", "test") if settings[name] is not None}
        if fraction := settings["validation_fraction"]:
            rows = {"train": rows["train"], "validation": self._hold_out(rows["train"], fraction)} | rows
        splits = {}
        for name, some in rows.items():
            splits[name] = self.encode(some, name)
            rank_zero_info(splits[name].describe(name))
        self.splits = splits

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches of the training rows."""
        return self._loader("train", shuffle=getattr(self.trainer, "overfit_batches", 0) == 0)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches of the validation rows, if there are any."""
        return self._loader("validation") if "validation" in self.splits else []

    def test_dataloader(self) -> ResumableLoader:
        """Batches of the test rows."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def _rows(self, name: str) -> TextRows:
        settings = self.hparams
        return read_text_rows(
            settings[name],
            split=settings[f"{name}_split"],
            subset=settings["subset"],
            cache_dir=settings["cache_dir"],
        )

    def _hold_out(self, train: TextRows, fraction: float) -> TextRows:
        """Take some training rows, drawn by seed, for validation."""
        order = np.random.default_rng(self.hparams["seed"]).permutation(len(train.rows))
        chosen = set(order[: round(len(order) * fraction)].tolist())
        if not 0 < len(chosen) < len(order):
            raise PaCAError(
                f"validation_fraction {fraction} of the {len(order)} rows of {train.location} leaves the training or "
                "the validation split empty."
            )
        held_out = TextRows(train.location)
        for rows, keep in ((held_out, True), (train, False)):
            pairs = zip(train.rows, train.places, strict=True)
            kept = [pair for number, pair in enumerate(pairs) if (number in chosen) == keep]
            rows.rows, rows.places = [row for row, _ in kept], [place for _, place in kept]
        return held_out

    def _loader(self, name: str, shuffle: bool = False) -> ResumableLoader:
        if name not in self.splits:
            raise PaCAError(f"there is no {name} data: set `{name}` of the data module.")
        split, settings = self.splits[name], self.hparams
        order = BatchOrder(
            split.lengths,
            settings["batch_size"],
            trained=split.items,
            shuffle=shuffle,
            group_by_length=settings["group_by_length"],
            seed=settings["seed"],
            **share_of(self.trainer),
            name=f"the {name} split ({split.location})",
        )
        reader = TextReader(split, self.pad_token_id, settings["pad_to_multiple_of"], settings["max_length"])
        trainer = self.trainer if name == "train" else None
        return ResumableLoader(reader, order, self.collate, settings["num_workers"], trainer)

    @staticmethod
    def collate(batch: Any) -> Any:
        """A batch as the module takes it, of what ``TextReader`` gives."""
        return batch
