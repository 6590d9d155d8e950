"""Stacked experts: layers beside the 3-D parameters that transformers keeps the weights of all experts in.

The experts of a block are one module with parameters such as ``gate_up_proj``, shape (experts, out_features,
in_features), and a forward that multiplies by them. Each gets a layer as a child of that module: it holds delta, base
columns and indices. Hooks around the forward put a :class:`TappedWeight` in the parameter's place, so that the forward
stays the library's own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paca_lightning.core.dtensor import local
from paca_lightning.core.paths import EXPERT_COLUMNS
from paca_lightning.core.private.torch import apply_to_tensors
from paca_lightning.core.private.transformers import is_experts
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.expert_taps import TappedWeight
from paca_lightning.layers.plain import inside_transform, is_replaced, with_columns
from paca_lightning.layers.write_watch import check_written, is_written

STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""Names that transformers' forwards of experts know."""


class ExpertWeight(nn.Module):
    """A stacked weight of an experts module, seen as a linear layer. No part of the module until it is converted.

    Args:
        owner: The experts module.
        name: Of its parameter.
    """

    owner: nn.Module
    name: str

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        vars(self).update(owner=owner, name=name)  # unregistered: the owner is no part of this module

    @property
    def weight(self) -> Tensor:
        """The parameter, shape (experts, out_features, in_features), or (experts, in_features, out_features)."""
        # Not by its attribute, in whose place the forward may have a tapped weight.
        parameters = dict(self.owner.named_parameters(recurse=False))
        return parameters[self.name] if self.name in parameters else getattr(self.owner, self.name)

    @property
    def transposed(self) -> bool:
        """Whether the parameter is (experts, in_features, out_features)."""
        return bool(self.owner.is_transposed)

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Size of the input's last dimension."""
        return self.weight.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:
        """Size of the output's last dimension."""
        return self.weight.shape[2 if self.transposed else 1]

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """A view of the parameter of shape (experts, out_features, in_features)."""
        weight = self.weight.detach() if weight is None else weight
        return weight.mT if self.transposed else weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load this module's tensors. The stacked parameter is its owner's: see :func:`_name_for_columns`."""
        state_dict.pop(f"{prefix}weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def expert_weights(module: nn.Module) -> Iterator[tuple[str, ExpertWeight]]:
    """The stacked weights of a module of transformers that dispatches to forwards of experts; of others none.

    Weights that are converted are left out: they have a child of their own.
    """
    if not is_experts(module):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name in STACKED and parameter.dim() == 3 and not hasattr(module, EXPERT_COLUMNS + name):
            yield name, ExpertWeight(module, name)


class PaCAExperts(PaCALayer, ExpertWeight):
    """Trained columns of a stacked weight: the same ``r`` columns of every expert, each with updates of its own.

    Delta and base columns have shape (experts, out_features, r). A delta gets its gradient from its own expert's
    tokens.
    """

    paca_dtype: torch.dtype  # of the parameter, when its columns were last written

    def _add_columns(self, indices: Tensor, scaling: float, base_class: type[nn.Module]) -> None:
        super()._add_columns(indices, scaling, base_class)
        if not any(isinstance(child, PaCAExperts) for child in self.owner.children()):
            handles = (
                self.owner.register_forward_pre_hook(_give_tapped),
                self.owner.register_forward_hook(_take_back, always_call=True),
                self.owner.register_load_state_dict_pre_hook(_name_for_columns),
            )
            vars(self.owner)["_paca_hooks"] = handles
        self.owner.register_module(EXPERT_COLUMNS + self.name, self)
        self.paca_dtype = self.weight.dtype

    def release(self, *, trained: bool) -> None:
        """Turn back into a view of the parameter, and leave the experts module."""
        super().release(trained=trained)
        delattr(self.owner, EXPERT_COLUMNS + self.name)
        if not any(isinstance(child, PaCAExperts) for child in self.owner.children()):
            for handle in vars(self.owner).pop("_paca_hooks"):
                handle.remove()

    def base_path(self, path: str) -> str:
        """Name of the parameter in the module that holds the experts module."""
        return f"{path.rpartition('.')[0]}.{self.name}".lstrip(".")

    def _rows(self) -> Tensor:
        return self.rows(local(self.weight).detach())

    def forward(self) -> Tensor | TappedWeight | None:  # type: ignore[override]
        """What takes the parameter's place in a forward of the experts; None if nothing has to."""
        delta = self.paca_delta
        trainable = self.paca_enabled and delta.requires_grad
        if is_replaced(delta) or (trainable and inside_transform()):
            return with_columns(self.weight, *self._columns(), transposed=self.transposed)
        if not (trainable and torch.is_grad_enabled()):
            return None
        if not torch.compiler.is_compiling() and not is_written(self, delta):
            check_written(self, delta)
        indices = self.paca_indices
        return TappedWeight(self.weight, delta, indices, self.factor, self.transposed, self.paca_path)

    def _apply(self, fn: Any, recurse: bool = True) -> "PaCAExperts":
        """Move or cast delta and base columns, and the parameter: a module casts its own after its children's."""
        super()._apply(fn, recurse)
        apply_to_tensors(self.owner, fn, recurse=False)
        if self.weight.dtype != self.paca_dtype and not self.weight.is_meta:
            self.write_columns()
        self.paca_dtype = self.weight.dtype
        return self

    def extra_repr(self) -> str:
        """Shape, rank and scaling."""
        sizes = f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._describe()}"


def _give_tapped(owner: nn.Module, _: Any) -> None:
    for child in owner.children():
        if isinstance(child, PaCAExperts) and (weight := child()) is not None:
            vars(owner)[child.name] = weight


def _take_back(owner: nn.Module, *_: Any) -> None:
    for child in owner.children():
        if isinstance(child, PaCAExperts):
            vars(owner).pop(child.name, None)


def _name_for_columns(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Enter a stacked weight also under its columns' name: PyTorch shows a child only what has its prefix."""
    for child in owner.children():
        if isinstance(child, PaCAExperts) and prefix + child.name in state_dict:
            state_dict[f"{prefix}{EXPERT_COLUMNS}{child.name}.weight"] = state_dict[prefix + child.name]
