"""State dicts that hold what was trained, not the base model: hooks on a converted module."""

from typing import Any

from torch import nn

from paca_lightning.adapters.frozen_keys import drop_frozen, frozen_names, is_among
from paca_lightning.conversion.changed_state import remember_thawed
from paca_lightning.conversion.state import Conversion, conversion_of
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import ROWS
from paca_lightning.core.paths import clean_path
from paca_lightning.layers.base import paca_layers

ADAPTER = ("paca_delta", "paca_indices")
HOOKED = "_paca_state_dict_hooks"
"""Attribute of a module that has the hooks. They stay after ``merge``, and then do nothing."""


def keep_trained_state(module: nn.Module) -> None:
    """From now on leave frozen parameters out of a module's state dict, and accept a state dict without them.

    Hooks on the module act before any gathering of shards and for ``save_weights_only`` too, which a filter in a
    callback does not. Parameters are left out by the names that are frozen now: averaging and sharding make copies
    whose ``requires_grad`` says nothing. All other keys are as strict as before.

    Args:
        module: The root of a conversion, such as a LightningModule.
    """
    conversion = _conversion(module)
    conversion.frozen = frozen_names(module) - conversion.originals.keys()
    conversion.full_checkpoints = False
    if HOOKED not in vars(module):
        vars(module)[HOOKED] = True
        module.register_state_dict_post_hook(_drop_frozen)
        module.register_load_state_dict_pre_hook(_note_thawed)
        module.register_load_state_dict_post_hook(_check_loaded)


def keep_everything(module: nn.Module) -> None:
    """Put the frozen parameters back into a module's state dict."""
    if (conversion := conversion_of(module)) is not None:
        conversion.full_checkpoints = True


def _conversion(module: nn.Module) -> Conversion:
    conversion = conversion_of(module)
    assert conversion is not None, "keep_trained_state takes a converted module"
    return conversion


def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    conversion = conversion_of(module)
    if conversion is None or conversion.full_checkpoints:  # merged or unloaded since: a plain model is saved whole
        return
    drop_frozen(module, state_dict, prefix, conversion.frozen)


def _note_thawed(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep the base model's values of parameters that are frozen here and that a checkpoint brings: a run thawed them.

    Checkpoints and adapters hold them from now on. A checkpoint with the whole base model tells nothing of that kind.
    """
    conversion = conversion_of(module)
    layers = dict(paca_layers(module))
    if conversion is None or any(prefix + layer.base_path(path) in state_dict for path, layer in layers.items()):
        return
    thawed = {id(p) for name, p in module.named_parameters() if f"{prefix}{name}" in state_dict and not p.requires_grad}
    if thawed and any(f"{prefix}{path}.paca_delta" in state_dict for path in layers):
        remember_thawed(module, thawed)


def _check_loaded(module: nn.Module, incompatible: Any) -> None:
    """Accept missing frozen parameters; refuse a checkpoint with a part of the adapter, or with another one.

    Args:
        module: Whose state dict was loaded.
        incompatible: Has the lists ``missing_keys`` and ``unexpected_keys``, which PyTorch checks after this.
    """
    conversion = conversion_of(module)
    if conversion is None:
        return
    missing, unexpected = incompatible.missing_keys, incompatible.unexpected_keys
    if rows := [key for key in (*missing, *unexpected) if key.endswith(f".{ROWS}")]:
        where = "nothing for" if rows[0] in missing else "rows of new tokens that the model lacks:"
        raise PaCAError(f"The checkpoint has {where} {rows[0]!r}. Use the new_tokens it was trained with.")
    if foreign := [key for key in unexpected if key.endswith(ADAPTER)]:
        raise PaCAError(
            f"The checkpoint trains {_layer(foreign[0])!r} ({len(foreign) // 2} such layers), which is not a PaCA "
            "layer of this model. Use the target_modules it was trained with."
        )
    lost = [key for key in missing if key.endswith(ADAPTER)]
    frozen = {key for key in missing if is_among(key, conversion.frozen)}
    if not lost:
        trained = {clean_path(name) for name, parameter in module.named_parameters() if parameter.requires_grad}
        for key in missing:
            if is_among(key, trained):
                raise PaCAError(
                    f"The checkpoint has nothing for {key!r}, which this run trains whole. Use the modules_to_save it "
                    "was trained with."
                )
        if not conversion.full_checkpoints:
            missing[:] = [key for key in missing if key not in frozen]
        return
    # A base checkpoint has nothing of the adapter, but every weight; it does not know the base columns.
    frozen = {key for key in frozen if not key.endswith("paca_base_columns")}
    if len(lost) < 2 * sum(1 for _ in paca_layers(module)) or frozen:
        raise PaCAError(
            f"The checkpoint has nothing for the PaCA layer {_layer(lost[0])!r} ({len(lost) // 2} such layers). Use "
            "the target_modules it was trained with."
        )
    missing[:] = [key for key in missing if not key.endswith((*ADAPTER, "paca_base_columns"))]


def _layer(key: str) -> str:
    return key.rpartition(".")[0]
