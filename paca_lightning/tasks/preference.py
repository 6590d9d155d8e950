"""A LightningModule that tunes a causal language model by preferences: DPO, IPO, SimPO, ORPO and KTO."""

from typing import Any

import torch
from torch import Tensor

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import trainer_of
from paca_lightning.strategies.agreement import sum_of_ranks
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.batch import IGNORE_INDEX, TokenBatch, model_inputs
from paca_lightning.tasks.loss import next_tokens
from paca_lightning.tasks.preference_data import PreferenceDataModule
from paca_lightning.tasks.preference_losses import Answers, LossName, PreferenceLoss
from paca_lightning.tasks.reference import KEY, Reference
from paca_lightning.tasks.rewards import MeanRewards

_SETTINGS = {
    *("loss", "beta", "gamma", "label_smoothing"),
    *("desirable_weight", "undesirable_weight", "cache_reference"),
}


class PreferenceModule(CausalLMModule):
    """Trains a causal language model to prefer good answers to bad ones.

    Batches are those of :class:`~paca_lightning.tasks.PreferenceDataModule`. The reference of ``dpo``, ``ipo`` and
    ``kto`` is the base model of the callback that trains beside it (``PaCAStrategy``, ``PEFTStrategy``), so one model
    is in memory. Log-probabilities are computed in the output head, as the loss of
    :class:`~paca_lightning.tasks.CausalLMModule`, whose other settings are the same here.

    The loss of an optimizer step is the mean over its pairs, or rows with a label, in all micro-batches and on all
    ranks; the likelihood part of ``orpo`` is a mean over the tokens of a micro-batch. Logged below ``train/`` and
    ``val/``: ``loss``, the mean ``rewards/chosen``, ``rewards/rejected`` and ``rewards/margins``, and
    ``rewards/accuracies``: the share of pairs whose chosen answer has the higher reward; with labels, of rows whose
    reward has the right sign.

    Args:
        model: Hugging Face directory or hub id.
        loss: ``dpo``, ``ipo``, ``simpo`` or ``orpo`` for pairs, ``kto`` for rows with a label.
        beta: Weight of the reward; of ``orpo``, that of the odds ratio. Default: 0.1, for ``simpo`` 2.
        gamma: Margin of ``simpo``. Default: 1.
        label_smoothing: Share of labels taken to be wrong, for ``dpo`` and ``simpo``.
        desirable_weight: Weight of good rows, for ``kto``.
        undesirable_weight: Weight of bad rows, for ``kto``.
        cache_reference: Compute the reference of all rows once, before the first step. Saves a forward at each step,
            and is what full fine-tuning needs. Checkpoints keep the values.
        **settings: Those of :class:`~paca_lightning.tasks.CausalLMModule`.

    Raises:
        PaCAError: If a setting is unknown, out of range, or excluded by another one; and, from a run, if data and loss
            do not fit, or nothing keeps the reference.
    """

    def __init__(
        self,
        model: str,
        *,
        loss: LossName = "dpo",
        beta: float | None = None,
        gamma: float | None = None,
        label_smoothing: float = 0.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        cache_reference: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self.preference = PreferenceLoss(loss, beta, gamma, label_smoothing, desirable_weight, undesirable_weight)
        if cache_reference and not self.preference.needs_reference:
            raise PaCAError(f"loss: {loss} has no reference: leave out cache_reference.")
        self.reference = Reference(cache_reference)
        self.train_rewards, self.val_rewards, self.test_rewards = MeanRewards(), MeanRewards(), MeanRewards()

    def build_settings(self) -> dict[str, Any]:
        """The settings of the model alone."""
        return {name: value for name, value in super().build_settings().items() if name not in _SETTINGS}

    def on_fit_start(self) -> None:
        """Check that data and loss fit, and look for the reference.

        Raises:
            PaCAError: They do not fit, or nothing keeps the model before training.
        """
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, PreferenceDataModule):
            data.check_loss(self.preference.name)
        elif self.reference.cached:
            raise PaCAError("cache_reference: true needs a PreferenceDataModule, whose rows have numbers.")
        if self.preference.needs_reference:
            self.reference.find(self.trainer)

    def on_predict_start(self) -> None:
        """Refuse to predict.

        Raises:
            PaCAError: Always.
        """
        raise PaCAError("PreferenceModule predicts nothing. Losses of rows are CausalLMModule's; test logs rewards.")

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor]:
        """Log-probabilities of a batch's answers, ``log_probs`` (2B,). The reference is computed by it."""
        return {"log_probs": self.log_probs(batch)[0]}

    def on_validation_start(self) -> None:
        """Check the data, and that values of the reference belong to them."""
        super().on_validation_start()
        self._check_reference()

    def on_train_start(self) -> None:
        """Compute the reference, if it is to be cached."""
        super().on_train_start()
        self.train_rewards.reset()
        if self.reference.cached:
            self.reference.fill(self, self.trainer.datamodule)  # type: ignore[attr-defined]

    def _check_reference(self) -> None:
        if isinstance(data := getattr(self.trainer, "datamodule", None), PreferenceDataModule):
            self.reference.check(data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the values of the reference."""
        if self.reference.cached:
            checkpoint[KEY] = self.reference.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the values of the reference."""
        if self.reference.cached:
            self.reference.load(checkpoint.get(KEY, {}))

    def summed_loss(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Summed loss of a batch's pairs or labelled rows, and their number.

        Raises:
            PaCAError: The batch is not one of preferences.
        """
        if "rows" not in batch or "position_ids" in batch:
            raise PaCAError(
                "PreferenceModule takes batches of PreferenceDataModule: input_ids and labels of both answers, and "
                "rows; not packed."
            )
        reference = self._reference_of(batch) if self.preference.needs_reference else None
        if "good" in batch:
            return self._of_rows(batch, reference)
        return self._of_pairs(batch, reference)

    def log_probs(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Summed log-probability of each row's answer, and its tokens: (rows of the batch,) both."""
        losses, tokens = self.loss.of_rows(self.built(), model_inputs(batch), batch["labels"])
        return -losses, tokens

    def _reference_of(self, batch: TokenBatch) -> Tensor:
        values = self.reference.of({"val": "validation"}.get(split := self._split(), split), batch["rows"])
        if values is None:
            with self.reference.active(self):
                values = self.log_probs(batch)[0]
        return values

    def _of_pairs(self, batch: TokenBatch, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        count = len(batch["rows"])
        targets = next_tokens(batch["labels"])
        tokens = (targets != IGNORE_INDEX).sum(1)
        used = tokens[:count] > 0
        parts = [(slice(row, row + 1), target) for row, target in enumerate(targets)]
        if self.preference.name == "orpo":  # the likelihood of the chosen conversation, its prompt included
            whole = next_tokens(batch["input_ids"].masked_fill(_padding(batch), IGNORE_INDEX))[:count]
            prompts = whole.masked_fill((targets[:count] != IGNORE_INDEX) | ~used[:, None], IGNORE_INDEX)
            parts.append((slice(count), prompts.flatten()))
        losses = self.loss.of_parts(self.built(), model_inputs(batch), parts)
        log_probs = -torch.stack(losses[: 2 * count])
        sides = [
            Answers(log_probs[side], tokens[side], None if reference is None else reference[side])
            for side in (slice(count), slice(count, None))
        ]
        judged = self.preference.of_pairs(*sides)
        total = torch.where(used, judged.losses, 0).sum()
        if self.preference.name == "orpo":
            trained = tokens[:count].sum() + (prompts != IGNORE_INDEX).sum()
            total = total + (losses[-1] - log_probs[:count].sum()) / trained.clamp(min=1) * used.sum()
        self._rewards(self._split()).update(judged, used, torch.ones_like(used))
        return total, used.sum()

    def _of_rows(self, batch: TokenBatch, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss of labelled rows. Behind them are as many rows of strange answers, which estimate the divergence."""
        assert reference is not None
        count, good = len(batch["rows"]), batch["good"]
        tokens_of = {name: tensor for name, tensor in batch.items() if name not in ("rows", "good")}
        with torch.no_grad():
            strange, _ = self.log_probs({name: tensor[count:] for name, tensor in tokens_of.items()})
        log_probs, tokens = self.log_probs({name: tensor[:count] for name, tensor in tokens_of.items()})
        used = tokens > 0
        divergence = self._mean_over_ranks(torch.where(used, strange - reference[count:], 0).sum(), used.sum())
        answers = Answers(log_probs, tokens, reference[:count])
        judged = self.preference.of_rows(answers, good, divergence.clamp(min=0))
        self._rewards(self._split()).update(judged, used, good)
        return torch.where(used, judged.losses, 0).sum(), used.sum()

    def _split(self) -> str:
        """The split of the present batch; empty outside of a run."""
        trainer = trainer_of(self)
        if trainer is None:
            return ""
        return "train" if trainer.training else "test" if trainer.testing else "val"

    def _mean_over_ranks(self, total: Tensor, count: Tensor) -> Tensor:
        both = torch.stack([total, count.to(total.dtype)])
        if trainer_of(self) is not None:
            both = sum_of_ranks(both)
        return both[0] / both[1].clamp(min=1)

    def _rewards(self, split: str) -> MeanRewards:
        return {"val": self.val_rewards, "test": self.test_rewards}.get(split, self.train_rewards)

    def log_training(self, loss: Tensor) -> None:
        """Log the mean loss and rewards since the last log."""
        self.log("train/loss", loss, prog_bar=True)
        for name, value in self.train_rewards.means().items():
            self.log(f"train/rewards/{name}", value)

    def log_evaluation(self, split: str, loss: Tensor) -> None:
        """Log the mean loss and rewards of a whole split."""
        self.log(f"{split}/loss", loss, prog_bar=True, sync_dist=True)
        for name, value in self._rewards(split).means().items():
            self.log(f"{split}/rewards/{name}", value, sync_dist=True)


def _padding(batch: TokenBatch) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.zeros_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask == 0
