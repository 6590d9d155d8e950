"""Optuna's way to be told what to try next. Imports Optuna, so it is imported when a search begins."""

from collections.abc import Callable
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial
from typing_extensions import override


class OneParameterSampler(BaseSampler):
    """Samples the one parameter of a study by a function.

    Args:
        propose: Gives the next value.
    """

    def __init__(self, propose: Callable[[], float]) -> None:
        self._propose = propose

    @override
    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """No parameter depends on another."""
        return {}

    @override
    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing: see :meth:`sample_independent`."""
        return {}

    @override
    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        """The proposed value."""
        return self._propose()
