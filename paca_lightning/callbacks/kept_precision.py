"""What a method trains in fp32 stays so when Lightning casts the module to the precision of a run."""

from typing import Any

import torch
from torch import Tensor

from paca_lightning.other_methods.adapted import adapted_model, trained_parameters


class KeptPrecision:
    """Copies of the parameters that are trained in fp32, from before the cast until after it.

    A cast and back would round them.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def note(self, module: Any) -> None:
        """Copy them, before the cast."""
        trained = trained_parameters(module).items()
        self._values = {name: p.detach().clone() for name, p in trained if p.dtype == torch.float32}

    def restore(self, module: Any) -> None:
        """Widen what the method wants wide, and put the values back."""
        adapted = adapted_model(module)
        assert adapted is not None
        adapted.keep_wide()
        with torch.no_grad():
            for name, parameter in trained_parameters(module).items():
                if parameter.dtype == torch.float32 and name in self._values:
                    parameter.copy_(self._values[name])
        self._values.clear()
