"""Sharding a model with FSDP2: which modules are gathered together, and in which dtypes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from paca_lightning.core.dtensor import first_row, local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.torch import parameters_of_integers
from paca_lightning.core.private.transformers import is_pretrained_model
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.experts import PaCAExperts
from paca_lightning.layers.linear import PaCAConv1D
from paca_lightning.layers.nf4_linear import QPaCALinear
from paca_lightning.layers.rows import TrainedRows

RESHARDS_INTEGERS = torch.__version__ >= "2.12"
"""Whether FSDP2 keeps a share of packed weights: earlier, it asks a gradient for the share, which raises."""


@dataclass(frozen=True, kw_only=True)
class ShardingOptions:
    """How modules are sharded.

    Args:
        reshard_after_forward: True frees the gathered parameters of a block after its forward and gathers them again
            for its backward. False keeps them until the backward has used them. A number keeps a share of them, so
            that the backward gathers from that many ranks only, those of one node for example.
        mixed_precision: Dtypes of gathered parameters and of the gradients' reduction. Default: those of the
            parameters. NF4 layers whose scales it would narrow are units of their own and gathered as stored.
        cpu_offload: Keep this rank's rows, gradients and optimizer states in host memory.
    """

    reshard_after_forward: bool | int = True
    mixed_precision: MixedPrecisionPolicy | None = None
    cpu_offload: bool = False


@dataclass
class _Unit:
    """Modules whose parameters are gathered together, and what happens to them after the forward."""

    modules: list[nn.Module]
    reshard_after_forward: bool | int


def shard(model: nn.Module, mesh: DeviceMesh, blocks: Iterable[nn.Module], options: ShardingOptions) -> None:
    """Shard a model's parameters on dim 0, in place, so that a block at a time is gathered.

    A unit is what is gathered together. Units are: each block; the input embeddings and the output head of a Hugging
    Face model, as one unit if they share a weight; each PaCA layer outside these; the remaining parameters of each
    Hugging Face model; and all other parameters. A layer's weight, delta and base columns lie in one unit and are split
    alike, so that a rank has the same rows of all of them.

    Args:
        model: The root. Parameters in no other unit are gathered when it is called. Parameters on ``meta`` stay there.
        mesh: Has one dimension to shard over, or two: the first to replicate over, the second to shard over.
        blocks: Units within the model.
        options: How to shard.

    Raises:
        PaCAError: If a parameter cannot be sharded.
    """
    if isinstance(model, FSDPModule):
        return
    _check_parameters(model, options)
    units = [_Unit([block], options.reshard_after_forward) for block in blocks]
    units += _embedding_units(model, options)
    # The root is gathered for the whole of a step, within which disable_paca may write columns: PaCA layers elsewhere
    # are units of their own.
    inside = {child for unit in units for root in unit.modules for child in root.modules()}
    layers = [m for m in model.modules() if isinstance(m, PaCALayer) and m not in inside]
    elsewhere = list(dict.fromkeys(m.owner if isinstance(m, PaCAExperts) else m for m in layers))
    units += [_Unit([layer], options.reshard_after_forward) for layer in elsewhere]
    units += [_Unit([module], options.reshard_after_forward) for module in _pretrained_models(model)]
    units.append(_Unit([model], False))
    _check_shared_parameters(model, units)
    for unit in units:
        _shard_unit(unit, mesh, options)


def local_rows(tensor: Tensor) -> slice:
    """The rows of a tensor that this rank holds. A tensor that is not sharded has all its rows on every rank."""
    start = first_row(tensor)
    return slice(start, start + len(local(tensor)))


def _shard_unit(unit: _Unit, mesh: DeviceMesh, options: ShardingOptions) -> None:
    modules = [module for root in unit.modules for module in _outside_units(root)]
    wide = _with_wide_scales(modules, options.mixed_precision)
    for module in wide:
        assert options.mixed_precision is not None
        as_stored = replace(options.mixed_precision, param_dtype=None)
        _fully_shard([module], unit.reshard_after_forward, mesh, replace(options, mixed_precision=as_stored))
    for module in _with_narrow_gradients([module for module in modules if module not in wide]):
        _fully_shard([module], unit.reshard_after_forward, mesh, options)
    _fully_shard(unit.modules, unit.reshard_after_forward, mesh, options)


def _fully_shard(modules: list[nn.Module], reshard: bool | int, mesh: DeviceMesh, options: ShardingOptions) -> None:
    """Make one unit of modules, without the units inside them."""
    if any(isinstance(module, FSDPModule) for module in modules):
        return
    layers = [m for root in modules for m in _outside_units(root) if isinstance(m, PaCALayer | TrainedRows)]
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if options.cpu_offload else OffloadPolicy()
    try:
        with parameters_of_integers():
            fully_shard(
                modules if len(modules) > 1 else modules[0],
                mesh=mesh,
                reshard_after_forward=reshard,
                mp_policy=options.mixed_precision or MixedPrecisionPolicy(),
                offload_policy=offload,
            )
    except ValueError as error:
        raise PaCAError(f"{type(modules[0]).__name__} cannot be sharded: {error}") from error
    if reshard is not True:  # gathered parameters outlive the forward: columns must not be written into them
        unit = modules[0]
        assert isinstance(unit, FSDPModule)
        for layer in layers:
            layer.paca_reshard = unit.reshard


def _outside_units(root: nn.Module) -> Iterator[nn.Module]:
    """A module and the modules in it, except those that are in a unit already."""
    if not isinstance(root, FSDPModule):
        yield root
        for child in root.children():
            yield from _outside_units(child)


def _with_wide_scales(modules: list[nn.Module], policy: MixedPrecisionPolicy | None) -> list[nn.Module]:
    """NF4 layers with scales that the policy would narrow. The weight is computed from them, so they stay exact."""
    if policy is None or policy.param_dtype is None:
        return []
    dtype = policy.param_dtype
    return [
        module
        for module in modules
        if isinstance(module, QPaCALinear)
        and any(s.is_floating_point() and torch.promote_types(s.dtype, dtype) != dtype for s in module.scales)
    ]


def _with_narrow_gradients(modules: list[nn.Module]) -> list[nn.Module]:
    """Modules whose trained parameters are narrower than others': a unit reduces its gradients in one dtype."""
    dtypes = {
        module: {parameter.dtype for parameter in module.parameters(recurse=False) if parameter.requires_grad}
        for module in modules
    }
    widest = max((dtype for own in dtypes.values() for dtype in own), key=lambda dtype: dtype.itemsize, default=None)
    mixed = next((module for module, own in dtypes.items() if len(own) > 1), None)
    if mixed is not None:
        raise PaCAError(
            f"The trained parameters of a {type(mixed).__name__} have different dtypes ({dtypes[mixed]}), which FSDP2 "
            "cannot shard. Give them the same dtype, or freeze one of them."
        )
    return [module for module, own in dtypes.items() if own - {widest}]


def _pretrained_models(model: nn.Module) -> list[nn.Module]:
    """Hugging Face models inside a model, inner ones before outer ones."""
    return [m for m in reversed(list(model.modules())) if is_pretrained_model(m) and m is not model]


def _embedding_units(model: nn.Module, options: ShardingOptions) -> list[_Unit]:
    """Units of the input embeddings and the output heads of Hugging Face models."""
    embeddings, heads = (
        [end for m in model.modules() if isinstance(end := _declared_module(m, name), nn.Module)]
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    units: list[_Unit] = []
    for end in dict.fromkeys([*embeddings, *heads]):
        # A head's backward follows its forward: nothing could use the memory in between.
        unit = _Unit([end], options.reshard_after_forward and end not in heads)
        parameters = set(end.parameters())
        tied = [u for u in units if any(not parameters.isdisjoint(module.parameters()) for module in u.modules)]
        for other in tied:
            units.remove(other)
            unit.modules = other.modules + unit.modules
        units.append(unit)
    return units


def _declared_module(module: nn.Module, getter: str) -> object:
    """What a Hugging Face model returns from a getter; None for other modules, and for models without it."""
    if not hasattr(module, getter):
        return None
    try:
        return getattr(module, getter)()
    except NotImplementedError:  # raised by Hugging Face models that have none
        return None


def _check_parameters(model: nn.Module, options: ShardingOptions) -> None:
    keeps_a_share = not isinstance(options.reshard_after_forward, bool)
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise PaCAError(f"{path!r} is wrapped in FSDP1. Remove it: strategy='paca_fsdp2' shards the model.")
        if isinstance(module, PaCAConv1D):
            raise PaCAError(
                f"The weight of {path!r} (Hugging Face's Conv1D) is transposed, so that its rows are not those of its "
                "delta and the two cannot be sharded alike. Use strategy='ddp' or quantize='nf4'."
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            raise PaCAError(
                f"{name!r} is quantized by bitsandbytes, whose layers compute wrong results once sharded. Load the "
                "model in full precision and quantize it with PaCAConfig(quantize='nf4')."
            )
        if parameter.dim() == 0:
            raise PaCAError(f"{name!r} is a scalar, which FSDP2 cannot shard. Make it a tensor of shape (1,).")
        if keeps_a_share and not parameter.is_floating_point() and not RESHARDS_INTEGERS:
            raise PaCAError(
                f"{name!r} is packed, and FSDP2 of PyTorch {torch.__version__} cannot keep a share of packed weights. "
                "Set reshard_after_forward to true or false, or take PyTorch 2.12 or later."
            )


def _check_shared_parameters(model: nn.Module, units: list[_Unit]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    owners: dict[nn.Parameter, _Unit] = {}
    visited: set[nn.Module] = set()
    for unit in units:
        for module in (module for root in unit.modules for module in root.modules()):
            if module in visited:
                continue
            visited.add(module)
            for parameter in module.parameters(recurse=False):
                owner = owners.setdefault(parameter, unit)
                if owner is not unit:
                    first, second = (type(u.modules[0]).__name__ for u in (owner, unit))
                    raise PaCAError(
                        f"{names[parameter]!r} is shared by a {first} and a {second} that FSDP2 would gather at "
                        "different times. Name a class that contains both modules in blocks=[...]."
                    )
