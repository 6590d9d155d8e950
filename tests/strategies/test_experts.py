"""A strategy that has not been tried with stacked experts refuses them before training."""

from types import SimpleNamespace
from typing import Any

import pytest

from paca_lightning import PaCAConfig, PaCAError, apply_paca
from paca_lightning.strategies.hpu.mixins import HPUStrategyMixin
from tests.moe import tiny_moe


def test_stacked_experts_are_refused_on_hpus() -> None:
    model = tiny_moe("mixtral")
    apply_paca(model, PaCAConfig(r=2))
    strategy: Any = SimpleNamespace(model=model)
    with pytest.raises(PaCAError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' has .* never trained on HPUs"):
        HPUStrategyMixin.setup(strategy, SimpleNamespace())  # type: ignore[arg-type]
