"""Writes the loss of each row of a data set: high ones show mislabelled and hard examples."""

import json
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing
from paca_lightning.tasks.callbacks.run_directory import run_directory
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.loader import ResumableLoader
from paca_lightning.tasks.data.sampler import Batch
from paca_lightning.tasks.instruction import InstructionDataModule

FILE_NAME = "row_losses.jsonl"


class RowLosses(Callback):
    """Writes the loss of each conversation to ``row_losses.jsonl`` in the run's directory: ``paca-lightning predict``.

    Rows come from the data module's ``test`` source; to inspect the training data, name it there. A line is
    ``{"conversation": ..., "file": ..., "row": ..., "loss": ..., "tokens": ...}``: the number of the conversation (a
    row may hold several), the file and row as in error messages, the mean loss per trained token, and the number of
    trained tokens. Lines are in the order of the data.

    Raises:
        PaCAError: If the module is not a ``CausalLMModule``, the data module is not an ``InstructionDataModule``, or
            rows are packed.
    """

    _batches: Iterator[Batch]
    _lines: list[tuple[int, dict[str, Any]]]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up which conversations each batch holds."""
        if not isinstance(pl_module, CausalLMModule):
            raise PaCAError(
                f"RowLosses writes what a CausalLMModule predicts, and this is a {type(pl_module).__name__}."
            )
        datamodule, loader = getattr(trainer, "datamodule", None), trainer.predict_dataloaders
        if not isinstance(datamodule, InstructionDataModule) or not isinstance(loader, ResumableLoader):
            raise PaCAError(
                "RowLosses knows the rows of an InstructionDataModule alone, which predicts on its `test` source. Use "
                "one, or leave the callback out: the predictions hold the losses in the loader's order."
            )
        self._directory = run_directory(trainer)
        self._batches, self._lines = loader.sampler.batches(loader.sampler.epoch), []
        split = datamodule.splits["test"]
        self._files, self._rows = split.files(), split.column("row")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the losses of a batch."""
        planned = next(self._batches)
        if planned.repeated:
            return
        losses, tokens = outputs["loss"].tolist(), outputs["tokens"].tolist()
        for document, loss, count in zip(planned.documents.tolist(), losses, tokens, strict=True):
            where = {"conversation": document, "file": self._files[document], "row": int(self._rows[document])}
            self._lines.append((document, {**where, "loss": loss, "tokens": count}))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the losses of all processes and write them on the first."""
        ranks: list[list[tuple[int, dict[str, Any]]]] = [self._lines]
        if trainer.world_size > 1:
            ranks = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(ranks, self._lines)
        if not trainer.is_global_zero:
            return
        lines = sorted((line for rank in ranks for line in rank), key=lambda line: line[0])
        path = self._directory / FILE_NAME
        with replacing(path) as temporary:
            temporary.write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for _, line in lines), encoding="utf-8"
            )
        rank_zero_info(f"Losses of {len(lines):,} rows: {path}")
