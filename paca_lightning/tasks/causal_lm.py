"""A LightningModule that fine-tunes a causal language model from Hugging Face."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import Trained
from paca_lightning.core.private.lightning import trainer_of
from paca_lightning.tasks.data.batch import TokenBatch, model_inputs
from paca_lightning.tasks.data.new_tokens import check_new_tokens
from paca_lightning.tasks.decoder_blocks import check_block_settings
from paca_lightning.tasks.loss import CausalLMLoss, row_losses
from paca_lightning.tasks.new_tokens import build_with_new_tokens
from paca_lightning.tasks.packed_rows import PackedRows
from paca_lightning.tasks.packing_probe import check_first_batch, check_packing
from paca_lightning.tasks.pretrained import build_for_training
from paca_lightning.tasks.tuning import TuningModule


class CausalLMModule(TuningModule):
    """Trains any Hugging Face causal language model to predict the next token.

    ``configure_model`` builds the model at ``self.model``, so that a strategy can build it on the meta device and
    callbacks can convert its layers. All parameters that require a gradient are trained; callbacks freeze the others.

    A batch is a dictionary of ``input_ids`` (B, T) and ``labels`` (B, T), where needed with ``attention_mask`` (B, T)
    and ``position_ids`` (B, T). Labels are aligned with the inputs, as the loss shifts them; -100 marks tokens without
    a loss. In packed rows, the first label of each document must be -100.

    Before anything runs, the ``tokenizer`` of the data module, if it has one, is checked against the model.

    The loss of an optimizer step is the mean over the tokens it trains, in all its micro-batches and on all ranks (see
    :class:`~paca_lightning.tasks.step_loss.StepLoss`). Logged every ``log_every_n_steps``: ``train/loss``, the
    mean over all tokens since the last log, ``train/perplexity`` and ``train/grad_norm`` (before clipping). Logged
    after each validation: ``val/loss`` and ``val/perplexity``, exact over all tokens and processes; after each test
    ``test/loss`` and ``test/perplexity``. Lightning's ``LearningRateMonitor`` logs the learning rate, and
    :class:`~paca_lightning.tasks.TokenThroughput` the speed. ``predict`` returns the loss of each row, which
    :class:`~paca_lightning.tasks.RowLosses` writes to a file.

    Args:
        model: Hugging Face directory or hub id.
        dtype: Dtype of the weights: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ... Default: ``sdpa`` if the model has it, or
            else ``eager``.
        activation_checkpointing: ``true`` keeps only the input of each decoder block and recomputes the block in the
            backward: least memory, about a third more time. ``selective`` also keeps the outputs of GEMMs and of
            attention: less of a saving, for a few percent more time.
        compile: Compile each decoder block with ``torch.compile``.
        liger: Use Liger's kernels for norms, activations and rotary embeddings, on a GPU.
        pretrained: False starts from random weights of the shape in ``config.json``, for debugging.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the model.
        new_tokens: Tokens to add to the vocabulary, such as ``["<tool>", "</tool>"]``: to the model, whose embeddings
            grow if they have no spare rows, and to the tokenizer of the data module. Each begins as the mean of all
            others. Adapters and checkpoints hold them, and merged models have them.
        new_tokens_train: With ``PaCAStrategy``, ``rows`` trains the rows of the new tokens in the input embedding and
            in the output head, in fp32 and without weight decay; ``all`` trains both whole, as ``modules_to_save``.
        loss_chunk_size: Rows of logits that exist at a time in the loss. Default: as many as take the memory of the
            hidden states.
        loss_normalization: ``tokens`` weighs every trained token of an optimizer step alike. ``batch`` averages the
            mean losses of its micro-batches and ranks, so tokens of a short micro-batch weigh more.
        optimizer: Called with the parameters to train.
        lr_scheduler: Called with the optimizer. Steps after each optimizer step; ``ReduceLROnPlateau`` steps after
            each epoch and follows ``val/loss``. Schedules of :mod:`paca_lightning.tasks.schedules` are told the length
            of the run. Default: a constant learning rate.

    Raises:
        PaCAError: If a setting is unknown, out of range, or excluded by another one.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        activation_checkpointing: bool | Literal["selective"] = False,
        compile: bool = False,
        liger: bool = False,
        pretrained: bool = True,
        revision: str | None = None,
        trust_remote_code: bool = False,
        new_tokens: list[str] | None = None,
        new_tokens_train: Trained = "rows",
        loss_chunk_size: int | None = None,
        loss_normalization: Literal["tokens", "batch"] = "tokens",
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, loss_normalization)
        # Primitives only: checkpoints are loaded with weights_only=True.
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        check_block_settings(activation_checkpointing, compile)
        self.new_tokens = check_new_tokens(new_tokens)
        if new_tokens_train not in get_args(Trained):
            raise PaCAError(
                f"new_tokens_train={new_tokens_train!r} is unknown. Choose one of {list(get_args(Trained))}."
            )
        self.loss = CausalLMLoss(loss_chunk_size)
        self.packed_rows = PackedRows()

    def configure_model(self) -> None:
        """Build the model, once.

        Raises:
            PaCAError: If it cannot be loaded, checkpointed or compiled, or given the new tokens.
        """
        if self.model is None:
            self.model = build_for_training(**self.build_settings())

    def build_settings(self) -> dict[str, Any]:
        """What the model is built with: the tokenizer of the data, too, if there are new tokens."""
        settings = super().build_settings()
        train = settings.pop("new_tokens_train")
        if not settings.pop("new_tokens"):
            return settings
        data = getattr(getattr(trainer_of(self), "datamodule", None), "hparams", {})
        if isinstance(data.get("tokenizer"), str):
            tokenizer, revision = data["tokenizer"], data.get("revision")
        else:
            tokenizer, revision = settings["model"], settings.get("revision")
        return settings | {
            "streamed": False,  # the files have no such rows: each process reads the whole model into host memory
            "build": build_with_new_tokens,
            "tokens": self.new_tokens,
            "train": train,
            "tokenizer": tokenizer,
            "tokenizer_revision": revision,
        }

    def forward(self, batch: TokenBatch) -> Tensor:
        """Logits (B, T, V) of a batch."""
        model = self.built()
        # With a cache, Hugging Face models let packed documents attend to each other.
        logits: Tensor = model(**model_inputs(self.packed_rows(model, batch)), use_cache=False).logits
        return logits.reshape(*batch["input_ids"].shape, -1)

    def on_fit_start(self) -> None:
        """Check the data against the model.

        Raises:
            PaCAError: If they do not fit (see ``check_data``), or the model mixes packed documents (``choose_way``).
        """
        super().on_fit_start()
        check_packing(self, getattr(self.trainer, "datamodule", None), self.packed_rows, self.built())

    def on_validation_start(self) -> None:
        """Check the data against the model; ``fit`` has done so already."""
        if self.trainer.state.fn == "validate":
            self.on_fit_start()

    def on_train_batch_start(self, batch: TokenBatch, batch_idx: int) -> None:
        """Check packed rows of other data modules, and look up the tokens of an optimizer step."""
        check_first_batch(self, batch, self.packed_rows, self.built())
        super().on_train_batch_start(batch, batch_idx)

    def log_training(self, loss: Tensor) -> None:
        """Log the mean loss since the last log, and the perplexity."""
        super().log_training(loss)
        self.log("train/perplexity", loss.exp())

    def log_evaluation(self, split: str, loss: Tensor) -> None:
        """Log the loss and perplexity of a whole split."""
        super().log_evaluation(split, loss)
        self.log(f"{split}/perplexity", loss.exp(), sync_dist=True)

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor]:
        """The loss of each row; the logits of the whole batch exist meanwhile.

        Returns:
            On the CPU: ``loss`` (B,) fp32, the mean over each row's trained tokens (0 if it has none), and ``tokens``
            (B,) int64, their number.

        Raises:
            PaCAError: If the rows are packed.
        """
        if "position_ids" in batch:
            raise PaCAError("predict gives one loss a row, and packed rows are several in one: set packing: false.")
        losses, tokens = row_losses(self(batch), batch["labels"])
        return {"loss": losses.cpu(), "tokens": tokens.cpu()}

    def summed_loss(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch's trained tokens, and their number."""
        model = self.built()
        batch = self.packed_rows(model, batch)
        return self.loss(model, model_inputs(batch), batch["labels"])
