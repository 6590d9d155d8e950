"""Fine-tuning of a causal language model from Hugging Face as a LightningModule."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.decoder_blocks import checkpoint_activations, compile_blocks
from paca_lightning.tasks.loss import CausalLMLoss, row_losses
from paca_lightning.tasks.metrics import MeanTokenLoss
from paca_lightning.tasks.pretrained import build_causal_lm, checkpoint_directory
from paca_lightning.tasks.schedules import planned
from paca_lightning.tasks.tokenizer_check import check_data

Batch = dict[str, Tensor]
INPUTS = ("input_ids", "attention_mask", "position_ids")


class CausalLMModule(LightningModule):
    """Any Hugging Face causal language model, trained to predict the next token of the labelled ones.

    The model is built in ``configure_model``, so that a strategy can build it on the meta device and callbacks can
    convert its layers, and lives at ``self.model``. Which parameters are trained is not decided here: all that
    require a gradient are, all of the model's if nothing freezes some.

    Batches are dicts of ``input_ids`` (B, T), ``labels`` (B, T) with -100 where not trained, aligned with the inputs
    (the loss shifts them), and if need be ``attention_mask`` (B, T) and ``position_ids`` (B, T). Where documents are
    packed, the label of each one's first token must be -100.

    Where the data module has the ``tokenizer``, it is compared with the model before anything runs: ids that the model
    has no embeddings for, another model's vocabulary, rows longer than learned positions.

    Each micro-batch's loss is the mean over its own trained tokens; with gradient accumulation and over processes,
    gradients are averaged over micro-batches, so that a token in a short batch weighs more. Logged, at the trainer's
    ``log_every_n_steps``: ``train/loss``, the mean over all tokens since it was last logged, ``train/perplexity`` and
    ``train/grad_norm`` (before clipping); after each validation ``val/loss`` and ``val/perplexity``, exact over all
    tokens and processes, and ``test/`` likewise. Lightning's ``LearningRateMonitor`` logs the learning rate, and
    :class:`~paca_lightning.tasks.TokenThroughput` the speed. ``predict`` gives the loss of each row, which
    :class:`~paca_lightning.tasks.RowLosses` writes to a file.

    Args:
        model: Hugging Face directory or hub id.
        dtype: Of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...
        activation_checkpointing: Keep only the inputs of each decoder block and recompute the rest in the backward:
            less memory, about a third more time. ``selective`` also keeps the outputs of matrix products and of
            attention, and recomputes only what is cheap: part of the memory for a few percent more time.
        compile: Compile each decoder block with ``torch.compile`` at its first call.
        pretrained: False starts from random weights of the shape that ``config.json`` says, for debugging.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the model.
        loss_chunk_size: Rows of logits that exist at a time in the loss. Default: as fits the hidden states.
        optimizer: Called with the parameters to train.
        lr_scheduler: Called with the optimizer. Steps after each optimizer step; ``ReduceLROnPlateau`` after each
            epoch, with the last ``val/loss``. Schedules of :mod:`paca_lightning.tasks.schedules` are told the length of
            the run. Default: a constant learning rate.
    """

    model: PreTrainedModel | None

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        activation_checkpointing: bool | Literal["selective"] = False,
        compile: bool = False,
        pretrained: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        loss_chunk_size: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        # Primitives only: checkpoints are loaded with weights_only=True.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        if activation_checkpointing not in (False, True, "selective"):
            raise PaCAError(
                f"activation_checkpointing={activation_checkpointing!r} is unknown. Choose false, true or selective."
            )
        if compile and activation_checkpointing == "selective":
            raise PaCAError(
                "torch.compile itself chooses what to recompute: leave activation_checkpointing off with it."
            )
        if loss_chunk_size is not None and loss_chunk_size < 1:
            raise PaCAError(f"loss_chunk_size must be at least 1, not {loss_chunk_size}.")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.model = None
        self.loss = CausalLMLoss(loss_chunk_size)
        self.train_loss = MeanTokenLoss()
        self.val_loss = MeanTokenLoss()
        self.test_loss = MeanTokenLoss()

    def configure_model(self) -> None:
        """Build the model, once.

        Raises:
            PaCAError: If it cannot be loaded, checkpointed or compiled.
        """
        if self.model is not None:
            return
        settings = self.hparams
        strategy = None if self._trainer is None else self._trainer.strategy
        # Such a strategy fills a model on meta itself, of which no process ever holds the whole.
        streamed = settings["pretrained"] and getattr(strategy, "streams_checkpoints", False)
        with torch.device("meta") if streamed else nullcontext():
            model = build_causal_lm(
                settings["model"],
                dtype=settings["dtype"],
                attn_implementation=settings["attn_implementation"],
                pretrained=settings["pretrained"],
                revision=settings["revision"],
                trust_remote_code=settings["trust_remote_code"],
            )
        if streamed:
            vars(model)["checkpoint_directory"] = checkpoint_directory(settings["model"], settings["revision"])
        checkpoint_activations(model, settings["activation_checkpointing"])
        if settings["compile"]:
            compile_blocks(model)
        self.model = model

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of all parameters that require a gradient, and the schedule.

        Raises:
            PaCAError: If there is no such parameter, or the schedule needs the length of an endless run.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise PaCAError(
                "Every parameter is frozen: there is nothing to train. Add a callback that makes some trainable, such "
                "as PaCAStrategy, or leave the model unfrozen."
            )
        optimizer = self.optimizer(parameters)
        if self.lr_scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": planned(self.lr_scheduler(optimizer), self.trainer)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast, but leave fp32 buffers in fp32, as ``from_pretrained(dtype=...)`` does.

        Rotary frequencies are such buffers. Rounded to bf16, they turn the positions of long sequences by a radian.
        """
        wide = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if name in wide and buffer.dtype != torch.float32:
                owner, _, key = name.rpartition(".")
                self.get_submodule(owner)._buffers[key] = wide[name].to(buffer.device)
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) of a batch."""
        assert self.model is not None
        # With a cache, Hugging Face's models would let packed documents attend to each other.
        return self.model(**_inputs(batch), use_cache=False).logits

    def on_fit_start(self) -> None:
        """See that the data fit the model.

        Raises:
            PaCAError: If they do not (see ``check_data``).
        """
        self._check_data()

    def on_validation_start(self) -> None:
        """See that the data fit the model, if validation is all there is to do."""
        if self.trainer.state.fn == "validate":
            self._check_data()

    def on_test_start(self) -> None:
        """See that the data fit the model."""
        self._check_data()

    def _check_data(self) -> None:
        settings = self.hparams
        name = settings["model"] if settings["pretrained"] else None
        check_data(getattr(self.trainer, "datamodule", None), self._built(), name, settings["revision"])

    def on_train_start(self) -> None:
        """Forget what an earlier run had not logged yet."""
        self.train_loss.reset()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss per trained token of a micro-batch; 0 if it has none."""
        total, tokens = self._loss(batch)
        self.train_loss.update(total, tokens)
        return total / tokens.clamp(min=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the whole gradient, at logging steps."""
        if self.trainer._logger_connector.should_update_logs:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss since the last time, at logging steps."""
        if self.trainer.fit_loop._should_accumulate() or not self.trainer._logger_connector.should_update_logs:
            return
        # On the host, so that the progress bar does not await the device at each step.
        loss = self.train_loss.compute().cpu()
        self.train_loss.reset()
        if not loss.isfinite():
            rank_zero_warn(
                f"train/loss is {loss:g} at step {self.trainer.global_step}: it diverges. Lower the learning rate; "
                "EarlyStopping(monitor='train/loss', check_finite=True) ends such runs."
            )
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/perplexity", loss.exp())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation loss."""
        self._evaluate(self.val_loss, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test loss."""
        self._evaluate(self.test_loss, batch)

    def on_predict_start(self) -> None:
        """See that the data fit the model."""
        self._check_data()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Losses row by row, for which the logits of the batch exist for a moment.

        Returns:
            On the CPU: ``loss`` (B,) fp32, the mean over the trained tokens of each row (0 if it has none), and
            ``tokens`` (B,) int64, their number.

        Raises:
            PaCAError: If the rows are packed.
        """
        if "position_ids" in batch:
            raise PaCAError(
                "predict gives the loss of each row, and packed rows are several in one: set packing: false."
            )
        losses, tokens = row_losses(self(batch), batch["labels"])
        return {"loss": losses.cpu(), "tokens": tokens.cpu()}

    def on_validation_epoch_end(self) -> None:
        """Log the loss and perplexity of the whole split."""
        self._log_split("val", self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Log the loss and perplexity of the whole split."""
        self._log_split("test", self.test_loss)

    def _evaluate(self, metric: MeanTokenLoss, batch: Batch) -> None:
        metric.update(*self._loss(batch))

    def _log_split(self, split: str, metric: MeanTokenLoss) -> None:
        loss = metric.compute()
        metric.reset()
        # The metric is the same on all processes already; sync_dist keeps Lightning from warning that it might not be.
        self.log(f"{split}/loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{split}/perplexity", loss.exp(), sync_dist=True)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the losses of the trained tokens of a batch, and their number."""
        model = self._built()
        if "position_ids" in batch and model.config._attn_implementation.startswith("flash"):
            batch = one_row(batch)
        return self.loss(model, _inputs(batch), batch["labels"])

    def _built(self) -> PreTrainedModel:
        assert self.model is not None, "configure_model() builds the model"
        return self.model


def one_row(batch: Batch) -> Batch:
    """A batch of packed rows as a single packed row: the same computation, as positions restart in each document.

    Hugging Face keeps the attention of flash kernels inside documents for one row only; for more it would silently
    cross them.
    """
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()}


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in INPUTS if name in batch}
