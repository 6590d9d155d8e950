"""The loss of an optimizer step: the mean over the tokens it trains, in all its micro-batches on all ranks."""

from typing import Literal

from lightning.pytorch import Trainer
from torch import Tensor, nn

from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import is_accumulating
from paca_lightning.strategies.agreement import mean_of_ranks
from paca_lightning.tasks.data.loader import ResumableLoader


class StepLoss:
    """Scales the loss of each micro-batch so that a step's gradient is that of the mean over its trained tokens.

    Lightning averages the losses of a step's micro-batches and data parallelism averages the gradients of the ranks.
    The mean of such means weighs tokens of short micro-batches more. It also divides by ``accumulate_grad_batches``
    where an epoch ends with fewer micro-batches.

    A :class:`~paca_lightning.tasks.data.loader.ResumableLoader` knows the tokens of a step before its first
    micro-batch: a micro-batch's loss is its sum, times the number of micro-batches and ranks, over these tokens. There
    is no communication. After a resumption in the middle of a step, the step is what is left of it.

    With any other loader, the tokens are known after the last micro-batch. Until then sums are divided by a constant,
    the mean tokens of the run's first micro-batches. The last backward multiplies the gradients by what is missing,
    before callbacks see them and before clipping, with one reduction over the ranks.

    Outside of a step (no call of ``begin``, as where scores are measured), with one micro-batch on one rank, and with
    strategies that accumulate gradients themselves (DeepSpeed), the loss of a micro-batch is its own mean.

    Args:
        normalization: ``tokens`` as described; ``batch`` leaves each micro-batch its own mean.

    Raises:
        PaCAError: If it is neither.
    """

    def __init__(self, normalization: Literal["tokens", "batch"] = "tokens") -> None:
        if normalization not in ("tokens", "batch"):
            raise PaCAError(f"loss_normalization={normalization!r} is unknown. Choose tokens or batch.")
        self.normalization = normalization
        self.reset()

    def reset(self) -> None:
        """Forget steps of an earlier run."""
        self._running = False
        self._planned: tuple[int, int] | None = None  # micro-batches x ranks of the step, and its tokens
        self._counted: Tensor | None = None  # tokens so far, where no plan is known
        self._constant: Tensor | None = None

    def begin(self, trainer: Trainer, batch_idx: int) -> None:
        """Start a micro-batch, with its number in the epoch. The first one of a step looks up the step's tokens."""
        if self._running or self.normalization == "batch" or trainer.strategy.handles_gradient_accumulation:
            return
        micro_batches, loader = trainer.accumulate_grad_batches, trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            left = min(micro_batches - batch_idx % micro_batches, trainer.num_training_batches - batch_idx)
            tokens = loader.trained_tokens(int(left))
            if tokens is not None:
                self._planned = micro_batches * loader.sampler.world_size, max(tokens, 1)
        self._running = self._planned is not None or micro_batches * trainer.world_size > 1

    def of_micro_batch(self, trainer: Trainer | None, total: Tensor, tokens: Tensor) -> Tensor:
        """The loss to return from ``training_step``.

        Args:
            trainer: The trainer, if there is one.
            total: Summed loss of the micro-batch, a scalar.
            tokens: Its tokens with a loss, an int64 scalar.
        """
        if not self._running or trainer is None:
            return total / tokens.clamp(min=1)
        if self._planned is not None:
            factor, of_step = self._planned
            return total * factor / of_step
        if self._constant is None:
            self._constant = mean_of_ranks(tokens.to(total.dtype, copy=True)).clamp(min=1)
        self._counted = tokens if self._counted is None else self._counted + tokens
        return total / self._constant

    def after_backward(self, trainer: Trainer, model: nn.Module) -> None:
        """Multiply the gradients of a complete step by what their losses left out."""
        if self._counted is None or self._constant is None or is_accumulating(trainer):
            return
        tokens = mean_of_ranks(self._counted.to(self._constant.dtype, copy=True))
        # Without any token the gradients are zero, whatever they are multiplied by.
        factor = self._constant * trainer.accumulate_grad_batches / tokens.clamp(min=1e-3)
        for parameter in model.parameters():
            if parameter.grad is not None:
                gradient = local(parameter.grad)
                gradient.mul_(factor.to(gradient.device))
        self._counted = None

    def end(self, trainer: Trainer) -> None:
        """End a micro-batch."""
        if self._running and not is_accumulating(trainer):
            self._running, self._planned = False, None
