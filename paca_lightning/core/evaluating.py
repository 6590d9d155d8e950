"""Forwards beside training: in eval mode with each module's own mode restored, and FSDP2's gathered weights freed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside this context. Afterwards each module is in its own mode again: frozen parts may be in eval mode.

    Args:
        model: Whose modules to switch.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def reshard_units(model: nn.Module) -> None:
    """Free the parameters that a forward without backward left gathered in the units of FSDP2; others have none.

    Args:
        model: Whose modules may be units.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
