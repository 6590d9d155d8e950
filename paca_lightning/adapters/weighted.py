"""Weighted sums of adapters: one adapter whose columns are those of all, with the weighted updates."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paca_lightning.adapters.adapter import load_saved
from paca_lightning.adapters.saved import SavedAdapter
from paca_lightning.adapters.settings import AdapterSettings
from paca_lightning.adapters.tensors import AdapterTensors
from paca_lightning.adapters.update import whole_update
from paca_lightning.conversion.changed_state import changed_state
from paca_lightning.conversion.inventory import take_inventory
from paca_lightning.conversion.named_adapters import adapters_of, adding_adapter, set_adapter
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.conversion.state import config_of
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError


@dataclass(frozen=True)
class _Part:
    """An adapter in a sum, all in host memory, by name from the base model.

    Attributes:
        config: Its settings.
        indices: Of each layer, shape (r,).
        updates: Of each layer's columns, the scaling included: shape (out_features, r), or (experts, out_features, r).
        whole: What was trained beside columns.
        changed: Names of what of it lies outside modules trained whole.
    """

    config: PaCAConfig
    indices: dict[str, Tensor]
    updates: dict[str, Tensor]
    whole: dict[str, Tensor]
    changed: set[str]


def merge_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> ConversionReport:
    """Add an adapter that is a weighted sum of others: the base weight plus each one's update times its weight.

    The sum is exact, whether the adapters train the same columns and layers or not: in each layer it has the columns
    that any of them has. It is an adapter as any other, with scaling 1: it is the active one, ``save_adapter`` writes
    it, ``merge`` makes the model plain with it. Norms, biases and modules trained whole are summed likewise, as
    differences from the base model.

    Args:
        model: Into which the adapters were loaded by name, or a module around it.
        weights: By name of the adapter, such as ``{"a": 0.5, "b": 0.5}``; any numbers.
        name: Of the sum.

    Returns:
        The report of the conversion.

    Raises:
        PaCAError: If an adapter is not there, the name is taken, a weight is not finite, or adapters hold different
            counts (running statistics' ``num_batches_tracked``), which have no sum. The model is then as it was.
    """
    adapters = adapters_of(model)
    if not weights:
        raise PaCAError('There is nothing to sum: give weights, such as {"a": 0.5, "b": 0.5}.')
    for each, weight in weights.items():
        adapters.check_known(each)
        if not math.isfinite(weight):
            raise PaCAError(f"The weight of {each!r} is {weight}, no finite number.")
    adapters.check_free(name)
    root, active = adapters.root, adapters.active
    try:
        parts = []
        for each in weights:
            set_adapter(root, each)
            parts.append(_part_in(root))
        set_adapter(root, None)
        summed = _sum(root, parts, list(weights.values()))
    finally:
        set_adapter(root, active)
    with adding_adapter(root, name):
        return load_saved(root, summed)


def _part_in(model: nn.Module) -> _Part:
    config, inventory = config_of(model), take_inventory(model)
    assert config is not None
    layers = inventory.named_layers()
    saved = {f"{p}.{n}": t for p, module in inventory.named_saved().items() for n, t in module.state_dict().items()}
    changed = {inventory.relative(name): tensor for name, (tensor, _) in changed_state(model).items()}
    return _Part(
        config,
        {path: layer.paca_indices.cpu() for path, layer in layers.items()},
        {path: whole_update(layer).detach() * layer.scaling for path, layer in layers.items()},
        {name: tensor.detach().to("cpu", copy=True) for name, tensor in (saved | changed).items()},
        set(changed),
    )


def _sum(base: nn.Module, parts: list[_Part], weights: list[float]) -> SavedAdapter:
    indices: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for path in dict.fromkeys(path for part in parts for path in part.indices):
        there = [(part, weight) for part, weight in zip(parts, weights, strict=True) if path in part.indices]
        union = torch.cat([part.indices[path] for part, _ in there]).unique()  # sorted
        like = there[0][0].updates[path]
        delta = like.new_zeros(*like.shape[:-1], len(union))
        for part, weight in there:
            delta.index_add_(-1, torch.searchsorted(union, part.indices[path]), part.updates[path], alpha=weight)
        indices[path], deltas[path] = union, delta
    inventory = take_inventory(base)
    before = {inventory.relative(name): t for name, t in (inventory.parameters | inventory.buffers).items()}
    names = dict.fromkeys(name for part in parts for name in part.whole)
    whole = {name: _whole_sum(name, before[name].detach().cpu(), parts, weights) for name in names}
    settings = AdapterSettings(
        config=_config(parts, indices),
        scalings=dict.fromkeys(indices, 1.0),
        fingerprint=None,
        changed=sorted({name for part in parts for name in part.changed}),
        left=[],
        checksums=None,
    )
    return SavedAdapter(settings.config, settings, AdapterTensors(indices, deltas, whole), None, verified=True)


def _whole_sum(name: str, base: Tensor, parts: list[_Part], weights: list[float]) -> Tensor:
    values = [(part.whole[name], weight) for part, weight in zip(parts, weights, strict=True) if name in part.whole]
    if base.is_floating_point():
        wide = torch.promote_types(base.dtype, values[0][0].dtype)
        start = base.to(wide)
        return start + sum(weight * (value.to(wide) - start) for value, weight in values)
    if any(not torch.equal(value, values[0][0]) for value, _ in values):
        raise PaCAError(f"{name!r} holds other counts in each adapter, which have no weighted sum. Leave one out.")
    return values[0][0]


def _config(parts: list[_Part], indices: Mapping[str, Tensor]) -> PaCAConfig:
    """Settings that convert the layers of all parts: by one regular expression for each rank, as layers may be many."""
    by_rank: dict[int, list[str]] = {}
    for path, chosen in indices.items():
        by_rank.setdefault(len(chosen), []).append(path)
    patterns = {rank: "|".join(map(re.escape, paths)) for rank, paths in by_rank.items()}
    r, *others = sorted(by_rank, key=lambda rank: -len(by_rank[rank]))
    return PaCAConfig(
        r=r,
        target_modules="|".join(patterns.values()),
        rank_pattern={patterns[rank]: rank for rank in others},
        modules_to_save=sorted({name for part in parts for name in part.config.modules_to_save}),
        train_norms=any(part.config.train_norms for part in parts),
        train_biases=any(part.config.train_biases for part in parts),
    )
