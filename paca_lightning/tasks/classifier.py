"""A LightningModule that trains a head over labels, and the model below it."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_modules import declared_new
from paca_lightning.core.private.lightning import trainer_of
from paca_lightning.tasks.classification_data import ClassificationDataModule
from paca_lightning.tasks.classification_scores import Scores
from paca_lightning.tasks.data.batch import IGNORE_INDEX
from paca_lightning.tasks.data.text_batch import TextBatch, forward_arguments
from paca_lightning.tasks.decoder_blocks import check_block_settings
from paca_lightning.tasks.head_loss import head_loss
from paca_lightning.tasks.new_heads import HeadTask, build_with_head, has_head, label_names
from paca_lightning.tasks.pretrained import build_for_training
from paca_lightning.tasks.tuning import TuningModule


class ClassifierModule(TuningModule):
    """Trains any ``AutoModelForSequenceClassification`` or ``AutoModelForTokenClassification``.

    The task is one class for a text (``sequence``), one for each word (``tokens``), any number of labels for a text
    (``multi_label``), or a number for a text (``regression``). Task and labels come from the
    :class:`~paca_lightning.tasks.ClassificationDataModule` unless they are set here. The model's config keeps the names
    of the labels. A model without a head gets a new one, equal on every process; ``PaCAStrategy`` trains it whole.

    A batch has ``input_ids`` (B, T), where needed ``attention_mask`` and ``token_type_ids`` (B, T), and ``labels``:
    classes (B,) or (B, T) int64, -100 where there is none; numbers (B, labels) or (B,) for ``multi_label`` and
    ``regression``, NaN where there is none.

    The loss of an optimizer step is the mean over its rows (``tokens``: its words): cross-entropy, binary cross-entropy
    averaged over the labels, or the squared error. Logged: ``train/loss``, ``train/grad_norm``, ``val/loss``, and
    ``val/accuracy`` and ``val/f1`` (macro), or ``val/mse`` and ``val/pearson``; after a test ``test/...``. ``predict``
    returns logits and predictions.

    Args:
        model: Hugging Face directory or hub id, with or without a head.
        task: The task. Default: that of the data.
        labels: Names of the labels, or their number. Default: those of the data, or of the model's own head.
        dtype: Dtype of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ... Default: what the model has.
        activation_checkpointing: As for :class:`~paca_lightning.tasks.CausalLMModule`.
        compile: Compile each block with ``torch.compile``.
        pretrained: False starts from random weights of the shape in ``config.json``, for debugging.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the model.
        head_seed: Seed of a new head.
        optimizer: Called with the parameters to train.
        lr_scheduler: Called with the optimizer. Default: a constant learning rate.

    Raises:
        PaCAError: If a setting is unknown, out of range, or excluded by another one.
    """

    def __init__(
        self,
        model: str,
        *,
        task: HeadTask | None = None,
        labels: list[str] | int | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        activation_checkpointing: bool | Literal["selective"] = False,
        compile: bool = False,
        pretrained: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        head_seed: int = 0,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if isinstance(labels, int):
            labels = [str(number) for number in range(labels)]
        if labels is not None and task != "regression" and len(set(labels)) < 2:
            raise PaCAError(f"labels={labels!r}: there must be at least two, each of another name.")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.hparams["labels"] = labels
        check_block_settings(activation_checkpointing, compile)
        self._scores: Scores | None = None
        self._pad_token_id: int | None = None

    @property
    def labels(self) -> list[str]:
        """Names of the labels, once the model is built."""
        return label_names(self.built().config)

    @property
    def task(self) -> HeadTask:
        """The task, once the model is built."""
        task: HeadTask = self.hparams["task"]
        return task

    def configure_model(self) -> None:
        """Build the model, once, with the task and labels of the data.

        Raises:
            PaCAError: If it cannot be loaded, or task or labels are unknown or contradict the data.
        """
        if self.model is not None:
            return
        data = getattr(trainer_of(self), "datamodule", None)
        if isinstance(data, ClassificationDataModule):
            self._agree("task", data.task)
            self._agree("labels", data.labels)
            self._pad_token_id = data.pad_token_id
        self.take_settings("sequence", None, self._pad_token_id)
        # Not streamed: the files have no head to fill it from. Each process reads the whole model into host memory.
        settings = self.build_settings() | {"streamed": False}
        self.model = build_for_training(**settings, build=build_with_head, pad_token_id=self._pad_token_id)
        self.hparams["labels"] = None if self.task == "regression" else self.labels

    def take_settings(self, task: HeadTask | None, labels: list[str] | None, pad_token_id: int | None) -> None:
        """Take task and labels where there are none yet, and what rows are padded with."""
        self._pad_token_id = pad_token_id
        self.hparams["task"] = self.hparams["task"] or task
        if self.hparams["task"] != "regression":
            self.hparams["labels"] = self.hparams["labels"] or labels

    def configure_optimizers(self) -> Any:
        """The optimizer of all parameters that require a gradient, and its schedule.

        Raises:
            PaCAError: As ``configured``, or if a new head is frozen.
        """
        model = self.built()
        drawn = not self.hparams["pretrained"] or not has_head(model.config, self.task)
        for path in declared_new(model) if drawn else ():
            if not any(parameter.requires_grad for parameter in model.get_submodule(path).parameters()):
                raise PaCAError(
                    f"The new head {path!r} is frozen, so it would stay random. Train it whole: take it out of "
                    f"exclude_modules, or with PEFT's methods set task_type, or modules_to_save: [{path}]."
                )
        return super().configure_optimizers()

    def forward(self, batch: TextBatch) -> Tensor:
        """Logits of a batch: (B, labels), or (B, T, labels) for ``tokens``."""
        model = self.built()
        logits: Tensor = model(**forward_arguments(model, batch)).logits
        return logits

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """A micro-batch's part of the step's loss.

        Raises:
            PaCAError: If a label is not among those of the head (see ``check_batch``).
        """
        self.check_batch(batch, batch_idx)
        return super().training_step(batch, batch_idx)

    def check_batch(self, batch: TextBatch, batch_idx: int) -> None:
        """Check a batch of a run on the CPU, or the first one on another device, for which the host has to wait.

        Raises:
            PaCAError: If a label is not among those of the head, or the last token of rows cannot be told.
        """
        labels, count, config = batch["labels"], len(self.labels), self.built().config
        if trainer_of(self) is None or (batch_idx > 0 and not labels.is_cpu):
            return
        if not labels.is_floating_point():
            wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= count))]
            if len(wrong):
                raise PaCAError(
                    f"A batch has the label {int(wrong[0])}, and the head has {count} labels, from 0 to {count - 1}. "
                    "Correct the data, or `labels`."
                )
        several = self.task != "tokens" and len(batch["input_ids"]) > 1
        if several and getattr(config, "pad_token_id", None) is None:
            raise PaCAError(
                "The model's config has no pad_token_id, by which it finds the last token of a row. Set it in its "
                "config.json, or take the data from a ClassificationDataModule, whose tokenizer says it."
            )

    def on_validation_epoch_start(self) -> None:
        """Begin to measure."""
        self._scores = Scores(self.task, len(self.labels), self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add a batch to what is measured."""
        self.val_loss.update(*self._measured(batch, batch_idx))

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Add a batch to what is measured."""
        self.test_loss.update(*self._measured(batch, batch_idx))

    def log_evaluation(self, split: str, loss: Tensor) -> None:
        """Log the loss and the scores of a whole split."""
        super().log_evaluation(split, loss)
        assert self._scores is not None
        for name, value in self._scores.compute().items():
            self.log(f"{split}/{name}", value, prog_bar=name != "mse", sync_dist=True)

    def predict_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        """What the head says of each row.

        Returns:
            On the CPU: ``logits``, and ``prediction``: classes (B,) or (B, T), whether each label holds (B, labels), or
            numbers (B,).
        """
        logits = self(batch).float().cpu()
        if self.task == "regression":
            return {"logits": logits, "prediction": logits.flatten()}
        return {"logits": logits, "prediction": logits > 0 if self.task == "multi_label" else logits.argmax(-1)}

    def summed_loss(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch's rows or words, and their number."""
        return head_loss(self.task, self(batch), batch["labels"])

    def _measured(self, batch: TextBatch, batch_idx: int) -> tuple[Tensor, Tensor]:
        self.check_batch(batch, batch_idx)
        logits = self(batch)
        assert self._scores is not None
        self._scores.update(logits, batch["labels"])
        return head_loss(self.task, logits, batch["labels"])

    def _agree(self, name: str, theirs: Any) -> None:
        """Take a setting of the data where there is none of the module.

        Raises:
            PaCAError: If they are different.
        """
        own = self.hparams[name]
        numbers = name == "labels" and own and theirs and all(label.isdigit() for label in theirs)
        if numbers and len(own) == len(theirs):  # the module's names of labels that the data give as numbers
            return
        if own is not None and theirs is not None and own != theirs:
            raise PaCAError(
                f"The module's {name} is {own!r} and that of the data {theirs!r}. Set it in the data module alone, or "
                "make them equal."
            )
        self.hparams[name] = theirs if own is None else own
