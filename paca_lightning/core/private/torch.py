"""Private APIs of PyTorch (read in 2.13)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd import forward_ad
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # documented, without a public path
from torch.utils._pytree import tree_leaves, tree_map_only

WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Segments that torch.compile, ``checkpoint_wrapper`` and FSDP1 put into module paths. No API lists or removes them."""

GATHERING_OPERATORS = frozenset({"fsdp::all_gather_copy_in", "c10d::_allgather_base_", "fsdp::split_with_sizes_copy"})
"""Operators with which FSDP2 gathers parameters; their names are nowhere documented."""

UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""The view at the end of a batched matrix product; what a dispatch mode sees of it has no public name."""


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and registered classes; torch has no public tree functions."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree with ``fn`` of each tensor; torch has no public tree functions."""
    return tree_map_only(Tensor, fn, tree)


def largest_values(tensors: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each tensor (n,), NaN where one has NaN, in a few kernels for all of them.

    ``nn.utils.get_total_norm`` is the public way to this operator, and returns one number for all tensors.
    """
    return torch.stack(torch._foreach_norm(list(tensors), float("inf")))


def storage_id(storage: UntypedStorage) -> int:
    """Address of a storage: equal for all tensors that share it, as long as it lives.

    ``data_ptr()`` is 0 on meta, raises for fake tensors, and is 0 for every storage whose memory FSDP2 has freed.
    """
    return storage._cdata


def version_of(tensor: Tensor) -> int:
    """How often autograd saw a tensor change in place; 0 in inference mode, which does not count.

    The documentation of autograd tells of this counter under its private name only.
    """
    return 0 if tensor.is_inference() else tensor._version


def preserve_versions(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Inside, changes in place are not counted, so that a graph that saved the tensors can still run its backward.

    The tensors must have their values back at the end. ``Tensor.data`` hides changes too, but not those of a DTensor
    or a copy made by others.
    """
    from torch.autograd.grad_mode import _unsafe_preserve_version_counter

    return _unsafe_preserve_version_counter(tuple(tensors))


def step_hooks(optimizer: Any) -> Any:
    """The hooks that an optimizer runs after its steps; None if it runs none. Wrappers may show those of another one.

    ``register_step_post_hook`` raises AttributeError where a subclass does not call ``Optimizer.__init__``, and tells
    nothing of wrappers.
    """
    return getattr(optimizer, "_optimizer_step_post_hooks", None)


def is_mutable(operator: Any) -> bool:
    """Whether an operator (``OpOverload``) writes to an argument: its schema has no public accessor."""
    return bool(operator._schema.is_mutable)


def written_arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call that an operator (``OpOverload``) writes to: its schema has no public accessor."""
    arguments = operator._schema.arguments
    passed = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    return [passed.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def awaits_collective(operator: Any) -> bool:
    """Whether an operator waits for a collective to end; functional collectives have no public namespace."""
    return operator is torch.ops._c10d_functional.wait_tensor.default


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Names of a module's own buffers that its state dict leaves out. No API tells how they were registered."""
    return set(module._non_persistent_buffers_set)


def clear_load_hooks(module: nn.Module) -> None:
    """Remove a module's own hooks on loading: whoever registered them has the only public handles."""
    module._load_state_dict_pre_hooks.clear()
    module._load_state_dict_post_hooks.clear()


def apply_to_tensors(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
    """Replace every parameter, gradient and buffer in a module, or of its own, by ``fn`` of it.

    ``Module.to_empty`` does this for all tensors, and ``fn`` may choose some.
    """
    module._apply(fn, recurse)


def put_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in a parameter's place, be it a parameter or not; ``setattr`` refuses what is none."""
    module._parameters[name] = tensor  # type: ignore[assignment]


def replace_apply(module: nn.Module, replacement: Callable[..., nn.Module] | None) -> None:
    """Let ``to``, ``half`` and the like of one module call this with it; None: the method of its class again."""
    if replacement is None:
        del vars(module)["_apply"]
    else:
        vars(module)["_apply"] = partial(replacement, module)


def apply_of_class(module: nn.Module, fn: Callable[..., Tensor], recurse: bool) -> nn.Module:
    """What ``to`` and the like do with a module of this class; no public method takes a function for one tensor."""
    return type(module)._apply(module, fn, recurse)


def transforms_are_active() -> bool:
    """Whether a transform of ``torch.func`` or a ``dual_level`` of forward-mode differentiation is active.

    Neither has a public query, and an autograd function only fails inside them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_expanded_weight(tensor: Tensor) -> bool:
    """Whether a tensor is what ``call_for_per_sample_grads`` puts in a parameter's place; its class is private."""
    from torch.nn.utils._expanded_weights import ExpandedWeight

    return isinstance(tensor, ExpandedWeight)


def fake_tensors() -> AbstractContextManager[Any]:
    """Inside, new tensors have no data but a device; ``FakeTensorMode`` has no public path."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def real_tensors() -> AbstractContextManager[Any]:
    """Inside, new tensors have data even within ``fake_tensors()``; the way out of a mode has no public path."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def active_fake_mode() -> object | None:
    """The innermost ``fake_tensors()`` that is active: DTensor enters one of its own to infer shapes."""
    from torch._guards import active_fake_mode as active

    return active()


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a device but no data, so that nothing may depend on its values."""
    from torch._subclasses.fake_tensor import is_fake as fake

    return bool(fake(tensor))


def parts_of_schedule(schedule: LRScheduler) -> list[LRScheduler]:
    """A schedule, and those that it consists of (SequentialLR, ChainedScheduler): no public name lists them."""
    return [schedule, *(inner for part in getattr(schedule, "_schedulers", ()) for inner in parts_of_schedule(part))]


def note_last_rates(schedule: LRScheduler, rates: list[float | Tensor]) -> None:
    """Set what ``get_last_lr`` returns: a schedule computes it in its steps alone."""
    schedule._last_lr = list(rates)


def init_fake_process_group(ranks: int) -> None:
    """Make this process rank 0 of ``ranks`` that do not exist: collectives return at once, with any values.

    The backend "fake" is registered by a module of torch's tests, which has the store that it needs.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


@contextmanager
def parameters_of_integers() -> Iterator[None]:
    """Inside, ``nn.Parameter`` asks no gradient for integers, also where the caller leaves its default.

    FSDP2 does so with the shard of each parameter before PyTorch 2.12, which raises for a packed NF4 weight.
    """
    create = nn.Parameter.__new__

    def without_gradient(cls: type[nn.Parameter], data: Tensor | None = None, requires_grad: bool = True) -> Tensor:
        return create(cls, data, requires_grad and (data is None or data.is_floating_point() or data.is_complex()))

    nn.Parameter.__new__ = without_gradient  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Parameter.__new__ = create  # type: ignore[method-assign]


@contextmanager
def shards_copied_before_gathering() -> Iterator[None]:
    """Inside, FSDP2 copies every shard before it gathers it, as it does with shards that are offloaded to the host.

    Fake tensors have one device, so that FSDP2 sees nothing offloaded. No hook runs between the two.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    original: Any = FSDPParam.all_gather_inputs
    FSDPParam.all_gather_inputs = property(  # type: ignore[assignment,method-assign]
        lambda self: [shard.clone() for shard in original.__get__(self)]
    )
    try:
        yield
    finally:
        FSDPParam.all_gather_inputs = original  # type: ignore[method-assign]


SHARD_LIST_CLASSES = {
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),  # Python 3.13
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}
"""What the list of shards of ``torch.distributed.checkpoint`` is made of, beside dtypes. All are plain data."""
