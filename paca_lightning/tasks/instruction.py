"""The data module for instruction tuning: conversations in common formats, tokenized, batched and resumable."""

from collections.abc import Mapping
from typing import Any, Literal

import datasets
import numpy as np
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable
from paca_lightning.tasks.data.announcement import announce
from paca_lightning.tasks.data.chat import ChatEncoder
from paca_lightning.tasks.data.collate import DocumentReader, PadCollator
from paca_lightning.tasks.data.converters import TreePaths
from paca_lightning.tasks.data.documents import DocumentEncoder
from paca_lightning.tasks.data.formats import Format
from paca_lightning.tasks.data.loader import ResumableLoader
from paca_lightning.tasks.data.locations import check_present
from paca_lightning.tasks.data.mixture import DataSource, OnBadRow, Part, load_split, mixed, parts_of
from paca_lightning.tasks.data.new_tokens import forget_other_splits, new_tokens_of
from paca_lightning.tasks.data.sampler import BatchOrder, share_of
from paca_lightning.tasks.data.settings import check_held_out, check_numbers
from paca_lightning.tasks.data.split import TokenizedSplit
from paca_lightning.tasks.data.stream_loader import StreamLoader
from paca_lightning.tasks.data.streaming import check_stream_settings, first_rows, stream_loader
from paca_lightning.tasks.data.tokenizer import load_tokenizer, pad_token_id

SPLITS = ["train", "validation", "test"]
NEEDED = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"], "predict": ["test"]}
"""Splits that each kind of run takes."""


class InstructionDataModule(LightningDataModule):
    """Conversations for instruction tuning, as batches of `input_ids` and `labels`.

    A source is a local file (a JSON list or JSON Lines, also compressed by gzip, bzip2, xz or Zstandard, or Parquet),
    several of them (a list, a directory, or a pattern such as `shards/*.parquet`), a directory written by `datasets`'
    `save_to_disk`, or a data set id on the Hugging Face hub.

    Batches have an `attention_mask` if there is padding, or `position_ids` if rows are packed. The loaders shard the
    data over the processes themselves (the Trainer's `use_distributed_sampler` has no effect), use every row exactly
    once an epoch, and resume in the middle of an epoch. If an epoch's last step has fewer rows than processes, the
    others get a row whose labels are all -100. After `setup`, `tokenizer` is the tokenizer and `splits` holds the
    tokenized splits.

    Args:
        tokenizer: Directory or hub id of the tokenizer; usually the model's.
        train: Source of the training conversations. In a list, a source may have settings of its own (`DataSource`),
            such as `{location: FILE, weight: 0.5, max_samples: 1000}`.
        validation: Source of the validation conversations. None: see `validation_fraction`.
        test: Source of the test conversations, also used by `predict`. None: no test.
        format: Layout of a row: `chat` (messages with role and content), `sharegpt` (conversations with from and
            value), `alpaca`, `prompt_completion`, `question_answer`, `guanaco` (text with ### Human: ...), `oasst`
            (message trees), `oasst_messages`, `segments` (texts with a label), `tokens` (input_ids), or `auto`: told by
            each file's first row. `text` is raw text for continued pretraining: no chat template, all tokens trained.
        max_length: Most tokens of a conversation, which is cut there; longer raw text is split. With `packing`, tokens
            of a row.
        batch_size: Rows in a batch of each process.
        max_samples: Most training conversations of an epoch, drawn by `seed` from all.
        validation_fraction: Share of `train` held out if `validation` is None, drawn by `seed`. 0: no validation.
        loss_on: `assistant` trains the answers and their end-of-turn tokens; `all` trains every token.
        packing: Put several conversations into each row. Positions restart in each, which keeps attention inside it;
            the model must be called without a cache and without `attention_mask`. `CausalLMModule` tries before a run
            whether the model keeps conversations apart, and refuses one that does not.
        group_by_length: Batch conversations of similar length, which saves padding.
        pad_to_multiple_of: Rows are padded on the right to a multiple of this length, up to max_length.
        num_proc: Processes that tokenize. None: one for each core, and one alone for few rows.
        num_workers: Processes that prepare batches ahead. Rows are read as tokens, so 0 is usually fast enough.
        seed: Seed of the validation split and of the order of batches.
        chat_template: Jinja template, or a file with one, that replaces the tokenizer's. A tokenizer without a template
            gets ChatML whose turns end with its own end-of-sequence token.
        revision: Branch, tag or commit of the tokenizer on the hub.
        trust_remote_code: Whether to run code that comes with the tokenizer.
        cache_dir: Directory of tokenized data and downloads. None: the cache of `datasets`.
        tree_paths: `best` follows the best-ranked reply at every message of a tree; `all` takes every path.
        text_column: Field with the text of a `guanaco` or `text` row.
        subset: Configuration name of a hub data set.
        train_split: Split of the hub id or saved DatasetDict given as `train`; with a slice (`train[:100]`), some of
            its rows, or of the rows of local files.
        validation_split: Split of the one given as `validation`.
        test_split: Split of the one given as `test`.
        on_bad_row: What to do if rows cannot be used: raise an `error` that lists them, or `drop` and count them.
        streaming: Read and tokenize the training data as they are trained, for files larger than memory. There is no
            epoch of all rows: set `max_steps`, or `limit_train_batches` to a whole number.
        shuffle_buffer: Rows of a stream that are shuffled at a time; all processes together keep so many in memory.
        strict_template: Raise an error, not a warning, where the chat template leaves out or adds text, or has no
            end-of-turn token.

    Raises:
        PaCAError: A number out of its range; and, from `prepare_data` and `setup`, a tokenizer, source or row that
            cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, TokenizedSplit]

    def __init__(
        self,
        tokenizer: str,
        train: str | DataSource | list[str | DataSource],
        validation: str | DataSource | list[str | DataSource] | None = None,
        test: str | DataSource | list[str | DataSource] | None = None,
        format: Format = "auto",
        max_length: int = 512,
        batch_size: int = 4,
        validation_fraction: float = 0.0,
        loss_on: Literal["assistant", "all"] = "assistant",
        packing: bool = False,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        chat_template: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        tree_paths: TreePaths = "best",
        text_column: str = "text",
        subset: str | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        on_bad_row: OnBadRow = "error",
        strict_template: bool = False,
        num_proc: int | None = None,
        max_samples: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_numbers(self.hparams, {"num_proc": 1, "max_samples": 1, "shuffle_buffer": 1})
        check_held_out(self.hparams)
        if streaming:
            check_stream_settings(self.hparams)
        self.splits = {}

    def prepare_data(self) -> None:
        """Tokenize the splits that the run needs into the cache, on one process of each node; without a run, all."""
        check_writable(self.hparams["cache_dir"] or datasets.config.HF_DATASETS_CACHE, "cache_dir")
        needed = NEEDED.get(getattr(getattr(self.trainer, "state", None), "fn", None) or "", SPLITS)
        if needed == ["test"]:
            self._check_given("test", self.hparams)
        if self.hparams["validation_fraction"] and "validation" in needed:
            needed = [*needed, "train"]
        names = [name for name in SPLITS if name in needed and self.hparams[name] is not None]
        check_present(*(self.hparams[name] for name in names))
        encode = self._encoder()
        for name in names:
            split = self._load(name, encode)
            announce(name, split, self.hparams, self._mixed(split)[1] if name == "train" else [])

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that a stage needs from the cache."""
        forget_other_splits(self)
        missing = [name for name in NEEDED.get(stage or "", SPLITS) if name not in self.splits]
        if not missing:
            return
        encode, fraction = self._encoder(), self.hparams["validation_fraction"]
        self.tokenizer = encode.encoder.tokenizer
        for name in missing:
            if name in self.splits:
                continue
            if name == "train" or (name == "validation" and fraction):
                split = self._load("train", encode)
                if fraction:
                    split, self.splits["validation"] = split.hold_out(fraction, self.hparams["seed"])
                self.splits["train"] = self._mixed(split)[0]
            elif self.hparams[name] is not None:
                self.splits[name] = self._load(name, encode)

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled batches of the training split."""
        if self.hparams["streaming"]:
            return stream_loader(self.hparams, self._parts("train"), self._encoder(), self.trainer)
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._loader("train", shuffle=not overfitting)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches of the validation split, if there is one."""
        return self._loader("validation") if "validation" in self.splits else []

    def test_dataloader(self) -> ResumableLoader:
        """Batches of the test split."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    @staticmethod
    def _check_given(name: str, given: Mapping[str, Any]) -> None:
        if given.get(name) is None:
            raise PaCAError(f"there is no {name} data: set `{name}` of the data module.")

    def _encoder(self) -> DocumentEncoder:
        hparams = self.hparams
        tokenizer = load_tokenizer(
            hparams["tokenizer"],
            hparams["chat_template"],
            revision=hparams["revision"],
            trust_remote_code=hparams["trust_remote_code"],
            new_tokens=new_tokens_of(self),
        )
        encoder = ChatEncoder(tokenizer, hparams["max_length"], hparams["loss_on"])
        return DocumentEncoder(encoder, hparams["text_column"], hparams["tree_paths"])

    @property
    def row_format(self) -> str:
        """The format of the rows."""
        return str(self.hparams["format"])

    def _parts(self, name: str) -> list[Part]:
        hparams = self.hparams
        settings = {"split": hparams[f"{name}_split"], "format": self.row_format}
        settings |= {"subset": hparams["subset"]} if hparams["subset"] else {}
        return parts_of(hparams[name], settings, name, hparams["cache_dir"])

    def _load(self, name: str, encode: DocumentEncoder) -> TokenizedSplit:
        if name == "train" and self.hparams["streaming"]:
            return first_rows(self.hparams, self._parts(name), encode, self.trainer)
        settings = {key: self.hparams[key] for key in ("cache_dir", "num_proc", "on_bad_row")}
        return load_split(name, self._parts(name), encode, **settings)

    def _mixed(self, train: TokenizedSplit) -> tuple[TokenizedSplit, list[str]]:
        return mixed(train, self._parts("train"), self.hparams["max_samples"], self.hparams["seed"])

    def _loader(self, name: str, shuffle: bool = False) -> ResumableLoader:
        self._check_given(name, self.splits)
        split, hparams = self.splits[name], self.hparams
        order = self._order(name, split.column("length"), split.column("trained_length"), shuffle)
        shape = (hparams["pad_to_multiple_of"], hparams["max_length"], hparams["packing"])
        collator = PadCollator(pad_token_id(self.tokenizer), *shape)
        trainer = self.trainer if name == "train" else None
        return ResumableLoader(DocumentReader(split.dataset), order, collator, hparams["num_workers"], trainer)

    def _order(self, name: str, lengths: np.ndarray, trained: np.ndarray, shuffle: bool) -> BatchOrder:
        """The batches of a split; lengths and trained tokens as ``BatchOrder`` takes them."""
        hparams = self.hparams
        return BatchOrder(
            lengths,
            hparams["batch_size"],
            trained=trained,
            shuffle=shuffle,
            group_by_length=hparams["group_by_length"],
            pack_to=hparams["max_length"] if hparams["packing"] else None,
            seed=hparams["seed"],
            **share_of(self.trainer),
            name=f"the {name} split ({self.splits[name].location})",
        )
