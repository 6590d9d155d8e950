"""Which steps of a training are points of its history."""

from typing import NamedTuple


class PointSteps(NamedTuple):
    """Step 0, each multiple of ``every``, and the powers of two up to ``log_spaced_to``."""

    every: int
    log_spaced_to: int

    def after(self, step: int) -> int:
        """The first point after a step."""
        multiple, power = (step // self.every + 1) * self.every, 1 << step.bit_length()
        return min(multiple, power) if power <= self.log_spaced_to else multiple

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and (step == 0 or self.after(step - 1) == step)
