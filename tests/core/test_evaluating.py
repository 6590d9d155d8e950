"""Eval mode for a while: each module's own mode comes back."""

import pytest
from torch import nn

from paca_lightning.core.evaluating import evaluating


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def fail_in_evaluation(model: nn.Module) -> None:
    with evaluating(model):
        assert modes(model) == [False, False, False]
        raise RuntimeError("in the middle")


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    model[1].eval()  # a frozen part
    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_evaluation(model)
    assert modes(model) == [True, True, False]
