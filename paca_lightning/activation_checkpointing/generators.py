"""States of random number generators, so that a recomputation draws the numbers that the forward drew."""

from collections.abc import Iterable

import torch


class GeneratorStates:
    """States of the CPU's generator and of those of some devices, taken on construction.

    Args:
        devices: Devices whose default generator an operator may use. The CPU's state is always taken.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
        self._cpu = torch.get_rng_state()
        self._states = {device: torch.get_device_module(device).get_rng_state(device) for device in accelerators}

    def restore(self) -> None:
        """Put the generators into these states."""
        torch.set_rng_state(self._cpu)
        for device, state in self._states.items():
            torch.get_device_module(device).set_rng_state(state, device)
