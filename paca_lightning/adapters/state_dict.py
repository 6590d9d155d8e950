"""Checkpoints that hold what was trained, not the base model: state-dict hooks on a module."""

from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import paca_layers

FROZEN = "_paca_frozen"
ADAPTER = ("paca_delta", "paca_indices")


def keep_trained_state(module: nn.Module) -> None:
    """From now on leave frozen parameters out of a module's state dict, and accept one without them.

    Hooks on the module itself, rather than a filter in a callback, act before any gathering of shards, and for
    ``save_weights_only`` too. Which parameters are left out is decided here, by name: averaging and sharding make
    copies whose ``requires_grad`` says nothing.

    Args:
        module: A converted module, such as a LightningModule.
    """
    known = FROZEN in vars(module)
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    vars(module)[FROZEN] = frozenset(frozen)
    if not known:
        module.register_state_dict_post_hook(_drop_frozen)
        module.register_load_state_dict_post_hook(_check_loaded)


def keep_everything(module: nn.Module) -> None:
    """Put the frozen parameters back into a module's state dict."""
    vars(module)[FROZEN] = frozenset()


def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if not any(paca_layers(module)):  # merged or unloaded since: an ordinary model, which is saved whole
        return
    trained_since = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    frozen = vars(module)[FROZEN] - trained_since
    for key in list(state_dict):
        if not key.startswith(prefix):  # of a sibling, if the module is inside another one
            continue
        name = key.removeprefix(prefix)
        # Some quantized layers keep their scales beside the weight, as "weight.absmax".
        if name in frozen or any(part in frozen for part in _parents(name)):
            del state_dict[key]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _check_loaded(module: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """Accept missing frozen parameters; refuse a checkpoint with a part of the adapter, or with another one."""
    missing, unexpected = incompatible.missing_keys, incompatible.unexpected_keys
    if foreign := [key for key in unexpected if key.endswith(ADAPTER)]:
        raise PaCAError(
            f"The checkpoint trains {_layer(foreign[0])!r} ({len(foreign) // 2} such layers), which is not a PaCA "
            "layer of this model. Use the target_modules it was trained with."
        )
    lost = [key for key in missing if key.endswith(ADAPTER)]
    frozen = {key for key in missing if any(key == name or key.endswith("." + name) for name in vars(module)[FROZEN])}
    if not lost:
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        for key in missing:
            if any(key == name or key.endswith("." + name) for name in trained):
                raise PaCAError(
                    f"The checkpoint has nothing for {key!r}, which this run trains whole. Use the modules_to_save it "
                    "was trained with."
                )
        missing[:] = [key for key in missing if key not in frozen]
        return
    # A base checkpoint has nothing of the adapter, but every weight; it does not know the base columns.
    frozen = {key for key in frozen if not key.endswith("paca_base_columns")}
    if len(lost) < sum(name.endswith(ADAPTER) for name, _ in _named_tensors(module)) or frozen:
        raise PaCAError(
            f"The checkpoint has nothing for the PaCA layer {_layer(lost[0])!r} ({len(lost) // 2} such layers). Use "
            "the target_modules it was trained with."
        )


def _named_tensors(module: nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _layer(key: str) -> str:
    return key.rpartition(".")[0]
