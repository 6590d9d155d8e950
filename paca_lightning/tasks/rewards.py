"""Mean rewards of good and bad answers: what preference tuning logs beside its loss."""

import torch
from torch import Tensor, nn

from paca_lightning.tasks.metrics import MeanTokenLoss
from paca_lightning.tasks.preference_losses import Judged


class MeanRewards(nn.Module):
    """Mean rewards of good and bad answers, over all batches and processes."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen, self.rejected, self.accuracies = MeanTokenLoss(), MeanTokenLoss(), MeanTokenLoss()

    def update(self, judged: Judged, used: Tensor, good: Tensor) -> None:
        """Add those of a batch; ``used`` and ``good`` (B,) are bool."""
        other = judged.rejected_rewards
        bad = used & ~good if other is None else used
        self.chosen.update(*_sum(judged.rewards, used & good))
        self.rejected.update(*_sum(judged.rewards if other is None else other, bad))
        right = (judged.rewards > 0) == good if other is None else judged.rewards > other
        self.accuracies.update(*_sum(right.to(judged.rewards.dtype), used))

    def means(self) -> dict[str, Tensor]:
        """The means since the last call; those of which there was no answer are left out."""
        means = {name: getattr(self, name).compute().cpu() for name in ("chosen", "rejected", "accuracies")}
        self.reset()
        means["margins"] = means["chosen"] - means["rejected"]
        return {name: mean for name, mean in means.items() if not mean.isnan()}

    def reset(self) -> None:
        """Forget what was added."""
        for metric in (self.chosen, self.rejected, self.accuracies):
            metric.reset()


def _sum(values: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(used, values, 0).sum(), used.sum()
