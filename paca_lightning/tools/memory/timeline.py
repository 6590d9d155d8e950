"""Memory in use over a training step, by kind."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Kind(IntEnum):
    """What memory is used for.

    ``ACTIVATIONS`` are saved by the forward for the backward, or recomputed there. ``TEMPORARY`` is freed within the
    forward, the backward or the optimizer's step, such as gradients of activations.
    """

    PARAMETERS = 0
    GATHERED_PARAMETERS = 1
    ACTIVATIONS = 2
    GRADIENTS = 3
    OPTIMIZER = 4
    TEMPORARY = 5


@dataclass(frozen=True)
class Timeline:
    """Memory in use after each operator of a step that changed it.

    Attributes:
        phases: The phase that each operator belongs to.
        sizes: Bytes in use, of shape (operators, kinds).
        trainable_parameters: How many parameters are trained, on all devices together.
    """

    phases: list[str]
    sizes: np.ndarray
    trainable_parameters: int

    @property
    def peak(self) -> int:
        """Most bytes in use at once."""
        return int(self.sizes.sum(1).max())

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return self.phases[int(self.sizes.sum(1).argmax())]

    @property
    def at_peak(self) -> dict[Kind, int]:
        """Bytes by kind at the peak."""
        row = self.sizes[int(self.sizes.sum(1).argmax())]
        return {kind: int(row[kind]) for kind in Kind}
