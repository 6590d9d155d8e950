"""State dicts of a module that a method beside PaCA has adapted: what is trained, not the base model."""

from typing import Any

from torch import nn

from paca_lightning.adapters.frozen_keys import drop_frozen, frozen_names, is_among
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import clean_path
from paca_lightning.other_methods.adapted import ADAPTED, AdaptedModel, adapted_model


def keep_trained(module: nn.Module, adapted: AdaptedModel, *, full_checkpoints: bool) -> None:
    """From now on leave frozen parameters out of a module's state dict, and accept a state dict without them.

    Args:
        module: The module of a run, whose model was adapted.
        adapted: Its model.
        full_checkpoints: Keep the frozen parameters.
    """
    adapted.frozen = set() if full_checkpoints else frozen_names(module)
    if ADAPTED not in vars(module):
        module.register_state_dict_post_hook(_drop_frozen)
        module.register_load_state_dict_post_hook(_check_loaded)
    vars(module)[ADAPTED] = adapted


def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if (adapted := adapted_model(module)) is not None:
        drop_frozen(module, state_dict, prefix, adapted.frozen)


def _check_loaded(module: nn.Module, incompatible: Any) -> None:
    """Accept missing frozen parameters; refuse a state dict that trains other parameters."""
    adapted = adapted_model(module)
    if adapted is None:
        return
    missing = [key for key in incompatible.missing_keys if not is_among(key, adapted.frozen)]
    incompatible.missing_keys[:] = missing
    trained = {clean_path(name) for name, parameter in module.named_parameters() if parameter.requires_grad}
    lost = [key for key in missing if is_among(key, trained)]
    for keys, problem in ((lost, "has nothing for"), (incompatible.unexpected_keys, "holds")):
        if keys:
            raise PaCAError(
                f"The checkpoint {problem} {keys[0]!r} ({len(keys)} such tensors), which does not fit what this run "
                f"trains ({adapted.method}). Use the config it was trained with."
            )
