"""What a LightningModule that is not converted does with the state dict of a PaCA run.

``load_from_checkpoint`` and a Trainer without PaCAStrategy run no callback of ours, so that nothing converts the module
first. The weights of a full checkpoint are those of the merged model. One with the adapter alone has none for it.
"""

import functools
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import paca_layers

CHECKS = "_paca_checks"
"""Attribute of the method that is wrapped already."""


def check_plain_modules() -> None:
    """From now on every LightningModule checks what it loads. Does so once."""
    load = LightningModule.load_state_dict
    if hasattr(load, CHECKS):
        return

    @functools.wraps(load)
    def load_state_dict(self: LightningModule, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return load(self, without_adapter(self, state_dict), *args, **kwargs)

    setattr(load_state_dict, CHECKS, True)
    LightningModule.load_state_dict = load_state_dict  # type: ignore[method-assign, assignment]


def without_adapter(module: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of a PaCA run for a module that is not converted: the weights, which hold the trained columns.

    Args:
        module: Any. What a converted one loads is left as it is.
        state_dict: Any.

    Raises:
        PaCAError: If it lacks weights of the module.
    """
    trained = [key.rpartition(".")[0] for key in state_dict if key.endswith(".paca_delta")]
    if not trained or any(paca_layers(module)):
        return state_dict
    weights = {key: value for key, value in state_dict.items() if not key.rpartition(".")[2].startswith("paca_")}
    if module.state_dict().keys() - weights.keys():
        raise PaCAError(
            f"The checkpoint holds a PaCA adapter ({trained[0]!r} is one of {len(trained)} layers), no base weights, "
            f"and {type(module).__name__} is not converted: neither load_from_checkpoint nor a Trainer without "
            "PaCAStrategy does that. Build the module, and pass the file as ckpt_path to a Trainer with "
            "callbacks=[PaCAStrategy(config)], or load the directory that AdapterCheckpoint wrote: "
            "load_adapter(module, directory). Checkpoints of PaCAStrategy(full_checkpoints=True) load without PaCA."
        )
    return weights
