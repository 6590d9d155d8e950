"""Parameters that are trained whole beside the columns, such as norm weights: in fp32, whatever the model is cast to.

A step of a bf16 weight near 1 is lost below 4e-3. So the parameter itself is fp32, as deltas are, and the module
computes with a copy of it in its own dtype, as a forward with the merged weight will.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paca_lightning.core.private.torch import apply_of_class, put_parameter, replace_apply
from paca_lightning.layers.casting import keeping_precision
from paca_lightning.layers.rms_norm import keep_as_before, keep_input_alone

ALONG = "_paca_along"
"""Attribute of a module of which parameters are trained along."""


@dataclass
class _Along:
    """What a module knows of its parameters that are trained along.

    Attributes:
        dtypes: By name of the parameter, the dtype that it would have otherwise, in which the module computes.
        hooks: Those that give the module the parameters in that dtype.
        wide: The parameters while a forward has their narrow copies in their place.
    """

    dtypes: dict[str, torch.dtype]
    hooks: list[RemovableHandle]
    wide: dict[str, nn.Parameter] = field(default_factory=dict)


def along_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own parameters that are trained along; none of most modules."""
    return tuple(vars(module)[ALONG].dtypes) if ALONG in vars(module) else ()


def train_along(module: nn.Module, names: Iterable[str]) -> None:
    """Train some of a module's own parameters in fp32 (fp64 stays), from now until :func:`end_along`."""
    if along_names(module):
        return
    parameters = {name: module.get_parameter(name) for name in names}
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    hooks = [
        module.register_forward_pre_hook(_give_narrow),
        module.register_forward_hook(_take_back, always_call=True),
    ]
    vars(module)[ALONG] = _Along(dtypes, hooks)
    replace_apply(module, _apply_wide)  # an instance's, and no subclass: copies and pickles keep it
    keep_input_alone(module)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.grad = None
        parameter.requires_grad_(True)


def end_along(module: nn.Module) -> None:
    """Leave a module's parameters in its own dtype, as its forward had them."""
    along: _Along = vars(module)[ALONG]
    for hook in along.hooks:
        hook.remove()
    for name, dtype in along.dtypes.items():
        parameter = module.get_parameter(name)
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
    keep_as_before(module)
    replace_apply(module, None)
    del vars(module)[ALONG]


def end_all_along(model: nn.Module) -> None:
    """:func:`end_along` of every module in a model of which parameters are trained along."""
    for module in model.modules():
        if along_names(module):
            end_along(module)


def _give_narrow(module: nn.Module, _: Any) -> None:
    along: _Along = vars(module)[ALONG]
    for name, dtype in along.dtypes.items():
        parameter = getattr(module, name)  # in functional_call no nn.Parameter
        if torch.promote_types(parameter.dtype, dtype) != dtype:  # FSDP2 may have narrowed it
            along.wide[name] = parameter
            put_parameter(module, name, parameter.to(dtype))


def _take_back(module: nn.Module, *_: Any) -> None:
    along: _Along = vars(module)[ALONG]
    for name, parameter in along.wide.items():
        put_parameter(module, name, parameter)
    along.wide.clear()


def _apply_wide(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """What ``to`` does, but no parameter that is trained along is narrowed; the dtype it would have is noted."""
    along: _Along = vars(module)[ALONG]
    parameters = [module.get_parameter(name) for name in along.dtypes]
    device = parameters[0].device
    along.dtypes = {name: fn(torch.empty(0, dtype=dtype, device=device)).dtype for name, dtype in along.dtypes.items()}
    kept: list[Tensor | None] = [*parameters, *(parameter.grad for parameter in parameters)]
    return apply_of_class(module, keeping_precision(fn, kept, ()), recurse)
