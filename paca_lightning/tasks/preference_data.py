"""The data module for preference tuning: pairs of answers, or answers with a label."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.collate import PadCollator
from paca_lightning.tasks.data.documents import DocumentEncoder
from paca_lightning.tasks.data.loader import ResumableLoader
from paca_lightning.tasks.data.mixture import DataSource, Part
from paca_lightning.tasks.data.preference_batches import PreferenceCollator, PreferenceReader
from paca_lightning.tasks.data.preference_encoder import FORMAT, PreferenceEncoder
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.split import TokenizedSplit
from paca_lightning.tasks.data.tokenizer import pad_token_id
from paca_lightning.tasks.instruction import InstructionDataModule

_FIXED = {
    "format": "auto",
    "loss_on": "assistant",
    "packing": False,
    "streaming": False,
    "tree_paths": "best",
    "text_column": "text",
}
"""Settings of instruction data that preferences do not have."""


class PreferenceDataModule(InstructionDataModule):
    """Preferences as batches of twice as many conversations: for `PreferenceModule`.

    Rows are pairs (`chosen` and `rejected`, with `prompt`, or with what both have in common as the prompt), or any rows
    of instruction data with a `label` or `kto_tag`, true or false. A split has one kind of rows. Sources, the chat
    template, the cache, reports and resuming are those of `InstructionDataModule`. The answers alone have labels.
    `max_length` cuts each conversation; a pair of which nothing is left to compare is dropped, and counted.

    Args:
        tokenizer: Directory or hub id of the tokenizer; usually the model's.
        train: Source of the training rows.
        max_length: Most tokens of a conversation.
        batch_size: Rows in a batch of each process: pairs, which are twice as many conversations.
        **settings: As for `InstructionDataModule`, without packing, streaming, `format`, `loss_on`, `tree_paths` and
            `text_column`.

    Raises:
        PaCAError: A setting is out of range or not for preferences; and, from `prepare_data` and `setup`, a tokenizer,
            source or row that cannot be used.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str | DataSource | list[str | DataSource],
        *,
        max_length: int = 512,
        batch_size: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, train, max_length=max_length, batch_size=batch_size, **settings)
        for name, only in _FIXED.items():
            if self.hparams[name] != only:
                raise PaCAError(
                    f"PreferenceDataModule has no {name}: preferences are not {_reason(name)}. Leave it out."
                )

    def check_loss(self, loss: str) -> None:
        """Check that the rows are those of a loss.

        Raises:
            PaCAError: They are not.
        """
        for name, split in self.splits.items():
            if _is_paired(split) == (loss == "kto"):
                found, others = ("pairs", "dpo, ipo, simpo or orpo") if loss == "kto" else ("rows with a label", "kto")
                raise PaCAError(f"{name}: {split.location} has {found}, for loss: {others}, not for loss: {loss}.")

    def reference_loader(self, name: str) -> ResumableLoader:
        """Batches of a split in a fixed order, with this process's share of the rows."""
        return self._loader(name)

    def checksum(self, name: str) -> str:
        """Of all tokens of a split, and where its conversations end."""
        split = self.splits[name]
        known = self._checksums.get(name)
        if known is None or known[0] is not split:
            hashed = xxhash.xxh3_128()
            table = split.dataset.select_columns(["input_ids", "chosen_length"]).with_format("arrow")[:]
            arrays = [chunk.flatten() for chunk in table.column("input_ids").chunks]
            for array in (*arrays, *table.column("chosen_length").chunks):
                hashed.update(array.to_numpy().tobytes())
            known = self._checksums[name] = (split, hashed.hexdigest())
        return known[1]

    @cached_property
    def _checksums(self) -> dict[str, tuple[TokenizedSplit, str]]:
        return {}

    def _encoder(self) -> DocumentEncoder:
        encode = super()._encoder()
        return PreferenceEncoder(encode.encoder, encode.text_column, encode.tree_paths)

    @property
    def row_format(self) -> str:
        """The format of the rows."""
        return FORMAT

    def _parts(self, name: str) -> list[Part]:
        hparams = self.hparams
        sources = hparams[name] if isinstance(hparams[name], list) else [hparams[name]]
        if any(isinstance(source, dict) and "format" in source for source in sources):
            raise PaCAError(f"{name}: a source of preferences has no `format`. Leave it out.")
        parts = super()._parts(name)
        return [replace(part, rows=replace(part.rows, sources=_with_tables(part.rows.sources))) for part in parts]

    def _load(self, name: str, encode: DocumentEncoder) -> TokenizedSplit:
        split = super()._load(name, encode)
        _check_kinds(split)
        return split

    def _loader(self, name: str, shuffle: bool = False) -> ResumableLoader:
        self._check_given(name, self.splits)
        module = getattr(self.trainer, "lightning_module", None)
        if isinstance(module, CausalLMModule) and not hasattr(module, "preference"):
            raise PaCAError(
                f"{type(module).__name__} would learn the bad answers of preferences, too. Use PreferenceModule, or "
                "InstructionDataModule with conversations."
            )
        split, hparams = self.splits[name], self.hparams
        lengths, firsts = split.column("length"), split.column("chosen_length")
        # What a loss counts are the rows.
        order = self._order(name, np.maximum(firsts, lengths - firsts), np.ones(len(lengths), np.int64), shuffle)
        pad = PadCollator(pad_token_id(self.tokenizer), hparams["pad_to_multiple_of"], hparams["max_length"])
        reader = PreferenceReader(split.dataset, hparams["max_length"], _is_paired(split))
        trainer = self.trainer if name == "train" else None
        return ResumableLoader(reader, order, PreferenceCollator(pad), hparams["num_workers"], trainer)


def _with_tables(sources: Sequence[Source]) -> list[Source]:
    return [replace(source, tables=True) for source in sources]


def _pairs(split: TokenizedSplit) -> np.ndarray:
    """Whether each document holds two conversations (documents,)."""
    firsts = split.column("chosen_length")
    both: np.ndarray = (firsts > 0) & (firsts < split.column("length"))
    return both


def _is_paired(split: TokenizedSplit) -> bool:
    return bool(_pairs(split)[0])


def _check_kinds(split: TokenizedSplit) -> None:
    """Refuse a split of both pairs and labels, and training labels of one kind.

    Raises:
        PaCAError: It is one.
    """
    pairs = _pairs(split)
    if pairs.any() and not pairs.all():
        first = int(np.flatnonzero(pairs != pairs[0])[0])
        place = f"{split.files()[first]}, row {split.column('row')[first]}"
        found, others = ("a pair", "rows with a label") if pairs[first] else ("a row with a label", "pairs")
        raise PaCAError(f"{place}: is {found}, but the rows before it are {others}. A split has one kind.")
    good = split.column("chosen_length") > 0
    if split.name == "train" and not pairs.any() and (good.all() or not good.any()):
        kind, missing = ("good", "bad") if good.all() else ("bad", "good")
        raise PaCAError(
            f"{split.location}: all {len(good):,} rows are labelled as {kind}. KTO learns from both kinds: add "
            f"{missing} answers. To train on good answers alone use InstructionDataModule."
        )


def _reason(name: str) -> str:
    return {"packing": "packed", "streaming": "streamed"}.get(name, "told apart by it")
