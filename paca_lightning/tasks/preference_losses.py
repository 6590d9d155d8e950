"""Losses of preference tuning: what a model pays for its log-probabilities of good and bad answers.

Shapes: B pairs, or rows with a label. Log-probabilities are sums over the tokens of an answer, unless said otherwise.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from paca_lightning.core.errors import PaCAError

LossName = Literal["dpo", "ipo", "simpo", "orpo", "kto"]

_BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
_NEUTRAL = -1.0  # a mean log-probability where there is no answer; any below 0 has finite odds


class Answers(NamedTuple):
    """Log-probability of each answer, its number of tokens, and its log-probability in the reference; (B,) each."""

    log_probs: Tensor
    tokens: Tensor
    reference: Tensor | None = None

    @property
    def means(self) -> Tensor:
        """Mean log-probability of a token."""
        return self.log_probs / self.tokens.clamp(min=1)

    @property
    def ratios(self) -> Tensor:
        """Log-ratio of model and reference."""
        assert self.reference is not None
        return self.log_probs - self.reference


class Judged(NamedTuple):
    """Losses (B,), and the rewards of answers, without gradient: of both sides (B,), or of the rows (B,) alone."""

    losses: Tensor
    rewards: Tensor
    rejected_rewards: Tensor | None = None


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss by name, with its settings.

    Args:
        name: ``dpo`` (arXiv 2305.18290), ``ipo`` (2310.12036, as its authors use it, per token), ``simpo``
            (2405.14734), ``orpo`` (2403.07691) or ``kto`` (2402.01306).
        beta: Weight of the reward. For ``orpo`` that of the odds ratio, lambda in the paper. Default: 0.1, for
            ``simpo`` 2.
        gamma: Margin of ``simpo``. Default: 1.
        label_smoothing: Share of labels taken to be wrong, below 0.5, for ``dpo`` (cDPO) and ``simpo``.
        desirable_weight: Weight of good rows, for ``kto``.
        undesirable_weight: Weight of bad rows, for ``kto``.

    Raises:
        PaCAError: A setting is out of range, or the loss has no such setting.
    """

    name: LossName = "dpo"
    beta: float | None = None
    gamma: float | None = None
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(LossName):
            raise PaCAError(f"loss={self.name!r} is unknown. Choose one of {', '.join(get_args(LossName))}.")
        if self.beta is not None and not self.beta > 0:
            raise PaCAError(f"beta must be above 0, not {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise PaCAError(f"label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}.")
        if not min(self.desirable_weight, self.undesirable_weight) > 0:
            raise PaCAError("desirable_weight and undesirable_weight must be above 0.")
        weighted = (self.desirable_weight, self.undesirable_weight) != (1, 1)
        for setting, given, losses in (
            ("gamma", self.gamma is not None, ("simpo",)),
            ("label_smoothing", self.label_smoothing > 0, ("dpo", "simpo")),
            ("desirable_weight and undesirable_weight", weighted, ("kto",)),
        ):
            if given and self.name not in losses:
                raise PaCAError(f"loss: {self.name} has no {setting}, which {' and '.join(losses)} use. Leave it out.")

    @property
    def strength(self) -> float:
        """``beta``, or the default of the loss."""
        return _BETAS[self.name] if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the model before training."""
        return self.name in ("dpo", "ipo", "kto")

    def of_pairs(self, chosen: Answers, rejected: Answers) -> Judged:
        """Losses of all but ``kto``; that of ``orpo`` is the odds-ratio part alone."""
        beta = self.strength
        if self.name in ("dpo", "ipo"):
            rewards = [beta * side.ratios.detach() for side in (chosen, rejected)]
        else:
            rewards = [beta * side.means.detach() for side in (chosen, rejected)]
        if self.name == "dpo":
            losses = self._logistic(beta * (chosen.ratios - rejected.ratios))
        elif self.name == "ipo":
            gap = chosen.ratios / chosen.tokens.clamp(min=1) - rejected.ratios / rejected.tokens.clamp(min=1)
            losses = (gap - 1 / (2 * beta)) ** 2
        elif self.name == "simpo":
            gamma = 1.0 if self.gamma is None else self.gamma
            losses = self._logistic(beta * (chosen.means - rejected.means) - gamma)
        else:
            losses = -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
        return Judged(losses, *rewards)

    def of_rows(self, answers: Answers, good: Tensor, divergence: Tensor) -> Judged:
        """Losses of ``kto``.

        Args:
            answers: Those of the rows.
            good: Whether each is a good one (B,), bool.
            divergence: The reference point: the estimated divergence of the model from the reference, a scalar.
        """
        rewards = self.strength * answers.ratios
        point = self.strength * divergence
        gains = torch.where(good, rewards - point, point - rewards)
        weights = torch.where(good, self.desirable_weight, self.undesirable_weight)
        return Judged(weights * (1 - gains.sigmoid()), rewards.detach())

    def _logistic(self, logits: Tensor) -> Tensor:
        """-log sigmoid(logits), with some labels the other way round."""
        wrong = self.label_smoothing
        return -F.logsigmoid(logits) * (1 - wrong) - F.logsigmoid(-logits) * wrong


def _log_odds(answers: Answers) -> Tensor:
    """Log-odds of the mean probability of a token: log p - log(1 - p)."""
    means = torch.where(answers.tokens > 0, answers.means, _NEUTRAL)
    return means - torch.log(-torch.expm1(means))
