"""Which modules FSDP2 gathers together, and sharding them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from paca_lightning.core.errors import PaCAError
from paca_lightning.layers.base import PaCALayer
from paca_lightning.layers.linear import PaCAConv1D


@dataclass(frozen=True, kw_only=True)
class ShardingOptions:
    """How modules are sharded.

    Args:
        reshard_after_forward: Free the gathered parameters of a block after its forward and gather them again for its
            backward. A number gathers again from that many ranks only, of one node say.
        mixed_precision: Dtypes of gathered parameters and of the reduction. Default: as the parameters are.
        cpu_offload: Keep this rank's rows, gradients and optimizer states in host memory.
    """

    reshard_after_forward: bool | int = True
    mixed_precision: MixedPrecisionPolicy | None = None
    cpu_offload: bool = False


@dataclass
class _Unit:
    """Modules whose parameters are gathered together."""

    modules: list[nn.Module]
    reshard_after_forward: bool | int


def shard(model: nn.Module, mesh: DeviceMesh, blocks: Iterable[nn.Module], options: ShardingOptions) -> None:
    """Shard a model's parameters on dim 0, in place, so that a block at a time is gathered.

    A unit is what is gathered together: each block; the input embeddings and the output head of a Hugging Face model,
    apart from each other unless they share a weight; each PaCA layer elsewhere; what else each Hugging Face model
    holds; and the rest. A layer's weight, delta and base columns lie in one unit and are split alike, so that a rank
    has the same rows of all of them.

    Args:
        model: The root: what lies in no other unit is gathered when it is called. Parameters on ``meta`` stay there.
        mesh: One dimension to shard over, behind another to replicate over or not.
        blocks: Units within the model.
        options: How.

    Raises:
        PaCAError: If a parameter cannot be sharded.
    """
    if isinstance(model, FSDPModule):
        return
    _check_parameters(model)
    units = [_Unit([block], options.reshard_after_forward) for block in blocks]
    units += _ends(model, options)
    # A step may call the root's forward and go on, so its parameters stay gathered in between; written columns would
    # then miss the sharded weight. PaCA layers elsewhere are gathered on their own.
    inside = {child for unit in units for root in unit.modules for child in root.modules()}
    units += [_Unit([m], True) for m in model.modules() if isinstance(m, PaCALayer) and m not in inside]
    units += [_Unit([module], options.reshard_after_forward) for module in _pretrained_models(model)]
    units.append(_Unit([model], False))
    _check_shared_parameters(model, units)
    for unit in units:
        if not any(isinstance(module, FSDPModule) for module in unit.modules):
            _shard_unit(unit, mesh, options)


def local_rows(tensor: Tensor) -> slice:
    """The rows of a tensor that this rank holds: all of them, unless it is sharded."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offset[0], offset[0] + shape[0])


def _shard_unit(unit: _Unit, mesh: DeviceMesh, options: ShardingOptions) -> None:
    modules = [module for root in unit.modules for module in _outside_units(root)]
    for module in _apart(modules):
        _fully_shard([module], unit.reshard_after_forward, mesh, options)
    # A weight that stayed gathered after a forward would miss columns written then.
    holds_columns = any(isinstance(module, PaCALayer) for module in modules)
    _fully_shard(unit.modules, unit.reshard_after_forward or holds_columns, mesh, options)


def _fully_shard(modules: list[nn.Module], reshard: bool | int, mesh: DeviceMesh, options: ShardingOptions) -> None:
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if options.cpu_offload else OffloadPolicy()
    try:
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=options.mixed_precision or MixedPrecisionPolicy(),
            offload_policy=offload,
        )
    except ValueError as error:
        raise PaCAError(f"{type(modules[0]).__name__} cannot be sharded: {error}") from error


def _outside_units(root: nn.Module) -> Iterator[nn.Module]:
    """A module and what it contains, without units inside it."""
    if not isinstance(root, FSDPModule):
        yield root
        for child in root.children():
            yield from _outside_units(child)


def _apart(modules: list[nn.Module]) -> list[nn.Module]:
    """Modules whose trained parameters are narrower than others': gradients are reduced together in one dtype."""
    dtypes = {
        module: {parameter.dtype for parameter in module.parameters(recurse=False) if parameter.requires_grad}
        for module in modules
    }
    widest = max((dtype for own in dtypes.values() for dtype in own), key=lambda dtype: dtype.itemsize, default=None)
    mixed = next((module for module, own in dtypes.items() if len(own) > 1), None)
    if mixed is not None:
        raise PaCAError(
            f"The trained parameters of a {type(mixed).__name__} have different dtypes ({dtypes[mixed]}), which FSDP2 "
            "cannot shard. Give them one dtype, or freeze one of them."
        )
    return [module for module, own in dtypes.items() if own - {widest}]


def _pretrained_models(model: nn.Module) -> list[nn.Module]:
    """Hugging Face models within a model, inner before outer."""
    return [m for m in reversed(list(model.modules())) if hasattr(m, "_no_split_modules") and m is not model]


def _ends(model: nn.Module, options: ShardingOptions) -> list[_Unit]:
    """Units of the input embeddings and the output heads of Hugging Face models."""
    embeddings, heads = (
        [end for m in model.modules() if isinstance(end := _call(m, name), nn.Module)]
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    units: list[_Unit] = []
    for end in dict.fromkeys([*embeddings, *heads]):
        # Between a head's forward and its backward lies nothing that could use the memory.
        unit = _Unit([end], options.reshard_after_forward and end not in heads)
        parameters = set(end.parameters())
        tied = [u for u in units if any(not parameters.isdisjoint(module.parameters()) for module in u.modules)]
        for other in tied:
            units.remove(other)
            unit.modules = other.modules + unit.modules
        units.append(unit)
    return units


def _call(module: nn.Module, getter: str) -> object:
    if not hasattr(module, getter):
        return None
    try:
        return getattr(module, getter)()
    except NotImplementedError:  # how Hugging Face models say that they have none
        return None


def _check_parameters(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise PaCAError(f"{path!r} is wrapped in FSDP1. Leave the wrapping to strategy='paca_fsdp2'.")
        if isinstance(module, PaCAConv1D):
            raise PaCAError(
                f"The weight of {path!r} (Hugging Face's Conv1D) is transposed, so its rows are not those of its delta "
                "and it cannot be sharded with it. Train it with strategy='ddp', or with quantize='nf4'."
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state"):
            raise PaCAError(
                f"{name!r} is quantized by bitsandbytes, whose layers compute wrongly once sharded. Load the model in "
                "its full precision and quantize with PaCAConfig(quantize='nf4')."
            )
        if parameter.dim() == 0:
            raise PaCAError(f"{name!r} is a scalar, which FSDP2 cannot shard. Make it a tensor of shape (1,).")


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
                        "different times. Name a class that contains both in blocks=[...]."
                    )
