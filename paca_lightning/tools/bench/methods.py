"""The methods of fine-tuning that are compared, each a change to the same base model."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paca_lightning.activation_checkpointing.blocks import checkpoint_blocks, find_blocks
from paca_lightning.conversion.convert import apply_paca
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.linear4bit_base import quantize_targets
from paca_lightning.conversion.targets import Target, resolve
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.experts import ExpertWeight
from paca_lightning.tools.bench.lora import add_lora, features_of, lora_rank

FLOOR = "floor"
QFLOOR = "qfloor"
QUANTIZED = (QFLOOR, "qpaca", "qlora")
"""Methods on an NF4 base."""

RECOMPUTATIONS = ("selective", "blocks")
"""What a method's own checkpointing recomputes: all but GEMMs and attention, or whole blocks."""


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning, with its rank and its own checkpointing.

    Attributes:
        name: As in :func:`parse_methods`.
        r: Rank, of a method that has one.
        recompute: One of :data:`RECOMPUTATIONS`, or None: as the workload says for all methods.
    """

    name: str
    r: int | None = None
    recompute: str | None = None

    @property
    def title(self) -> str:
        """Name and checkpointing, such as ``paca+selective``."""
        return self.name if self.recompute is None else f"{self.name}+{self.recompute}"

    @property
    def label(self) -> str:
        """Title and rank, such as ``paca r=16``."""
        return self.title if self.r is None else f"{self.title} r={self.r}"

    @property
    def floor(self) -> str:
        """Name of the floor to compare with: that of the same base; for the quantized floor, the floor."""
        return QFLOOR if self.name in QUANTIZED and self.name != QFLOOR else FLOOR

    def apply(self, base: nn.Module) -> nn.Module:
        """A model for this method, made from a base model that is left as it is.

        Weights that the method does not write are shared with the base, so that several methods fit into memory.

        Args:
            base: The model as built.

        Returns:
            The model, in which only the method's parameters require gradients.

        Raises:
            PaCAError: If the method needs a package that is not installed.
        """
        targets = targets_of(self.name, base)
        written = {
            "none": set(),
            "targets": {id(target.module.weight) for target in targets},
            "all": {id(parameter) for parameter in base.parameters()},
        }[_WRITES.get(self.name, "none")]
        shared = {id(parameter): parameter for parameter in base.parameters() if id(parameter) not in written}
        model = _APPLY[self.name](copy.deepcopy(base, memo=dict(shared)), self.r or 0, targets)
        if self.recompute is not None:
            checkpoint_blocks(find_blocks(model), selective=self.recompute == "selective")
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of what such a model trains."""
        return fused_adamw(model)


def targets_of(name: str, base: nn.Module) -> list[Target]:
    """The layers that PaCA trains on a method's base, and so does the method: an NF4 base has no stacked experts."""
    return resolve(take_inventory(base), PaCAConfig(quantize="nf4" if name in QUANTIZED else None)).targets


def stacked_experts(base: nn.Module) -> list[str]:
    """Paths of the stacked experts among the layers that PaCA trains."""
    return [target.path for target in targets_of("paca", base) if isinstance(target.module, ExpertWeight)]


def fused_adamw(model: nn.Module) -> Optimizer:
    """The optimizer of all methods that bring none of their own."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)


def train_nothing(model: nn.Module) -> nn.Module:
    """Freeze a model, but let gradients flow to the input of its first layer: no fine-tuning step can cost less."""

    def ask_for_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_(True) if torch.is_grad_enabled() else output

    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(ask_for_gradient)  # type: ignore[operator]
    return model


def _floor(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    return train_nothing(model)


def _qfloor(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    """The floor on QLoRA's base, bitsandbytes' NF4 layers."""
    quantize_targets(model, targets)
    return train_nothing(model)


def _paca(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    apply_paca(model, PaCAConfig(r=r))
    return model


def _qpaca(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    apply_paca(model, PaCAConfig(r=r, quantize="nf4"))
    return model


def _full(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    return model.requires_grad_(True)


def _lora(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    return add_lora(model, r, targets)


def _qlora(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    quantize_targets(model, targets)
    return add_lora(model, r, targets)


def _dora(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    return add_lora(model, r, targets, use_dora=True)


def _narrow_lora(model: nn.Module, r: int, targets: list[Target]) -> nn.Module:
    return add_lora(model, r, targets, fp32_adapters=False)


_APPLY: dict[str, Callable[[nn.Module, int, list[Target]], nn.Module]] = {
    FLOOR: _floor,
    "paca": _paca,
    "lora": _lora,
    "lora-narrow": _narrow_lora,
    "dora": _dora,
    "full": _full,
    QFLOOR: _qfloor,
    "qpaca": _qpaca,
    "qlora": _qlora,
}
_WRITES = {"paca": "targets", "qpaca": "targets", "full": "all"}
_UNRANKED = (FLOOR, QFLOOR, "full")
_BASELINES = ("lora", "lora-narrow", "dora", "qlora")


def parse_methods(names: list[str], ranks: list[int], match: str, base: nn.Module) -> list[Method]:
    """The methods that a user asks for, after the floor and, if one has an NF4 base, the quantized floor.

    Args:
        names: Names such as ``paca``, perhaps with a rank (``lora:8``) and with what to recompute
            (``paca:16+selective``).
        ranks: Ranks of methods whose name carries none.
        match: What LoRA and DoRA share with PaCA: the ``rank``, the number of trained ``parameters`` (about, as ranks
            are whole), or ``both``, one after the other.
        base: The model, on any device; its layers say how many parameters a rank takes.

    Returns:
        Each method once.

    Raises:
        PaCAError: If a name, ``match`` or what to recompute is unknown, or a rank is not a positive number.
    """
    if match not in ("rank", "parameters", "both"):
        raise PaCAError(f"match={match!r} is unknown. Choose rank, parameters or both.")
    quantized = any(re.split("[:+]", entry.strip())[0] in QUANTIZED for entry in names)
    methods = [Method(FLOOR), *([Method(QFLOOR)] if quantized else [])]
    for entry in names:
        entry, plus, recompute = entry.strip().partition("+")
        name, colon, own = entry.partition(":")
        if name not in _APPLY:
            raise PaCAError(f"There is no method {name!r}. Choose from {', '.join(_APPLY)}.")
        if plus and recompute not in RECOMPUTATIONS:
            raise PaCAError(f"{name}+{recompute}: choose what to recompute from {', '.join(RECOMPUTATIONS)}.")
        if name in _UNRANKED and colon:
            raise PaCAError(f"Method {name!r} has no rank; {entry!r} gives it one.")
        ranked = _ranked(name, [_parse_rank(own)] if colon else ranks, "rank" if colon else match, base)
        methods += [replace(method, recompute=recompute or None) for method in ranked]
    return list(dict.fromkeys(methods))


def _ranked(name: str, ranks: list[int], match: str, base: nn.Module) -> list[Method]:
    """A method at each rank; a baseline of PaCA also at ranks of equal size."""
    if name in _UNRANKED:
        return [Method(name)]
    same_rank = [Method(name, r) for r in ranks] if match != "parameters" or name not in _BASELINES else []
    same_size = (
        [Method(name, lora_rank(r, *features_of(targets_of(name, base)))) for r in ranks]
        if match != "rank" and name in _BASELINES
        else []
    )
    return same_rank + same_size


def _parse_rank(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise PaCAError(f"{text!r} is not a rank: it must be a positive whole number.")
    return int(text)
