"""What all tuning modules share: one optimizer, the loss of a step, and what is logged while they train."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from paca_lightning.core.private.lightning import is_accumulating, should_log, trainer_of
from paca_lightning.tasks.metrics import MeanTokenLoss
from paca_lightning.tasks.optimizer import configured
from paca_lightning.tasks.step_loss import StepLoss
from paca_lightning.tasks.tokenizer_check import check_data
from paca_lightning.tasks.wide_buffers import KeepsWideBuffers


class TuningModule(KeepsWideBuffers, LightningModule):
    """Trains a Hugging Face model whose loss is a sum over items: tokens, rows or words.

    A subclass builds ``self.model`` in ``configure_model`` and says in ``summed_loss`` what a batch costs. The loss of
    an optimizer step is the mean over the items it trains (see :class:`~paca_lightning.tasks.step_loss.StepLoss`).
    Logged every ``log_every_n_steps``: ``train/loss``, the mean over all items since the last log, and
    ``train/grad_norm``, before clipping. Logged after each validation and test: ``val/loss`` and ``test/loss``, exact
    over all items and processes.

    Args:
        optimizer: Called with the parameters to train.
        lr_scheduler: Called with the optimizer, if there is to be a schedule.
        loss_normalization: See :class:`~paca_lightning.tasks.step_loss.StepLoss`.

    Raises:
        PaCAError: If the normalization is unknown.
    """

    model: PreTrainedModel | None

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        loss_normalization: Literal["tokens", "batch"] = "tokens",
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.model = None
        self.step_loss = StepLoss(loss_normalization)
        self.train_loss, self.val_loss, self.test_loss = MeanTokenLoss(), MeanTokenLoss(), MeanTokenLoss()

    def summed_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch, and the int64 number of items it is summed over."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Check the data against the model.

        Raises:
            PaCAError: If they do not fit (see ``check_data``).
        """
        settings, data = self.hparams, getattr(self.trainer, "datamodule", None)
        check_data(data, self.built(), settings["model"] if settings["pretrained"] else None, settings["revision"])

    def on_test_start(self) -> None:
        """Check the data, as ``fit`` does."""
        self.on_fit_start()

    def on_predict_start(self) -> None:
        """Check the data, as ``fit`` does."""
        self.on_fit_start()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of all parameters that require a gradient, and its schedule.

        Raises:
            PaCAError: If there is no such parameter, or a setting cannot be used (see ``configured``).
        """
        return configured(self, self.optimizer, self.lr_scheduler)

    def on_train_start(self) -> None:
        """Drop losses that an earlier run has not logged."""
        self.train_loss.reset()
        self.step_loss.reset()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Look up the items of an optimizer step."""
        self.step_loss.begin(self.trainer, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """A micro-batch's part of the step's loss (``StepLoss``), times micro-batches and ranks; 0 without an item."""
        total, items = self.summed_loss(batch)
        self.train_loss.update(total, items)
        return self.step_loss.of_micro_batch(trainer_of(self), total, items)

    def on_after_backward(self) -> None:
        """Normalize the gradients of a step whose items were not known before."""
        self.step_loss.after_backward(self.trainer, self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the whole gradient, at logging steps."""
        if should_log(self.trainer):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the mean loss since the last log, at logging steps."""
        self.step_loss.end(self.trainer)
        if is_accumulating(self.trainer) or not should_log(self.trainer):
            return
        # On the host: the progress bar would wait for the device at every step.
        loss = self.train_loss.compute().cpu()
        self.train_loss.reset()
        if not loss.isfinite():
            rank_zero_warn(
                f"train/loss is {loss:g} at step {self.trainer.global_step}: it diverges. Lower the learning rate. "
                "EarlyStopping(monitor='train/loss', check_finite=True) stops such runs."
            )
        self.log_training(loss)

    def log_training(self, loss: Tensor) -> None:
        """Log the mean loss since the last log."""
        self.log("train/loss", loss, prog_bar=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation loss."""
        self.val_loss.update(*self.summed_loss(batch))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the test loss."""
        self.test_loss.update(*self.summed_loss(batch))

    def on_validation_epoch_end(self) -> None:
        """Log what was measured on the whole split."""
        self._evaluated("val", self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Log what was measured on the whole split."""
        self._evaluated("test", self.test_loss)

    def _evaluated(self, split: str, metric: MeanTokenLoss) -> None:
        loss = metric.compute()
        metric.reset()
        self.log_evaluation(split, loss)

    def log_evaluation(self, split: str, loss: Tensor) -> None:
        """Log the mean loss of a whole split, which is equal on all processes."""
        # Already equal: sync_dist=True avoids Lightning's warning that it may differ.
        self.log(f"{split}/loss", loss, prog_bar=True, sync_dist=True)

    def build_settings(self) -> dict[str, Any]:
        """What ``build_for_training`` is given: the hyperparameters, and how this run's strategy loads the model."""
        # LightningCLI adds hyperparameters of its own, such as "_class_path".
        settings = {name: value for name, value in self.hparams.items() if not name.startswith(("loss_", "_"))}
        trainer = trainer_of(self)
        strategy = None if trainer is None else trainer.strategy
        streamed = settings["pretrained"] and getattr(strategy, "streams_checkpoints", False)
        on_cpu = strategy is not None and strategy.root_device.type == "cpu"
        return settings | {"streamed": streamed, "in_memory": on_cpu}

    def built(self) -> PreTrainedModel:
        """The model, which ``configure_model`` has built."""
        assert self.model is not None, "configure_model() builds the model"
        return self.model
