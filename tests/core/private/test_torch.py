"""Canaries for the private APIs of PyTorch."""

import io
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import lr_scheduler

from paca_lightning.core.paths import clean_path
from paca_lightning.core.private import torch as private
from paca_lightning.core.shard_lists import read_shard_list
from tests.core.private.canary import Recorder, canary, check_coverage


def test_a_failed_canary_says_what_to_do() -> None:
    @canary("torch.storage_id")
    def fails() -> None:
        raise AttributeError("no attribute '_cdata'")

    with pytest.raises(AssertionError, match=rf"torch {torch.__version__.split('+')[0]}.*\(torch.storage_id\).*_cdata"):
        fails()


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    private.init_fake_process_group(2)
    yield
    dist.destroy_process_group()


@canary("torch.parts_of_schedule", "torch.note_last_rates")
def test_schedules_of_schedules() -> None:
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    parts = [lr_scheduler.ConstantLR(optimizer) for _ in range(3)]
    sequence = lr_scheduler.SequentialLR(optimizer, parts[:2], [3])
    whole = lr_scheduler.ChainedScheduler([sequence, parts[2]])
    assert private.parts_of_schedule(whole) == [whole, sequence, *parts]
    private.note_last_rates(whole, [0.5])
    assert whole.get_last_lr() == [0.5]


@canary("torch.put_parameter")
def test_a_tensor_takes_a_parameters_place() -> None:
    linear = nn.Linear(2, 1, bias=False)
    own = linear.weight
    private.put_parameter(linear, "weight", own * 2)
    linear(torch.ones(1, 2)).sum().backward()
    assert own.grad is not None
    assert own.grad.tolist() == [[2, 2]]


def _apply_doubled(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    return private.apply_of_class(module, lambda tensor: fn(tensor) * 2, recurse)


@canary("torch.replace_apply", "torch.apply_of_class")
def test_one_module_applies_another_function() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    before = [layer.weight.item() for layer in model]
    private.replace_apply(model[0], _apply_doubled)
    copied = pickle.loads(pickle.dumps(model)).double()
    assert [layer.weight.item() for layer in copied] == [2 * before[0], before[1]]
    private.replace_apply(copied[0], None)
    assert copied.float()[0].weight.item() == 2 * before[0]


@canary("torch.tensors_in", "torch.map_tensors")
def test_trees() -> None:
    first, second = torch.ones(1), torch.ones(2)
    tree = {"a": [first, (second, 3)], "b": None}
    assert [id(tensor) for tensor in private.tensors_in(tree)] == [id(first), id(second)]
    shapes = private.map_tensors(lambda tensor: tuple(tensor.shape), tree)
    assert shapes == {"a": [(1,), ((2,), 3)], "b": None}


@canary("torch.largest_values")
def test_largest_values() -> None:
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([float("nan"), 1.0]), torch.tensor([float("-inf")])]
    assert torch.equal(private.largest_values(tensors)[[0, 2]], torch.tensor([3.0, float("inf")]))
    assert private.largest_values(tensors)[1].isnan()
    assert private.largest_values([torch.ones(2).bfloat16(), torch.ones(2).double()]).tolist() == [1, 1]


@canary("torch.storage_id")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_id(device: str) -> None:
    tensor = torch.empty(4, device=device)
    storage = tensor.untyped_storage()
    key = private.storage_id(storage)
    assert private.storage_id(tensor[1:].untyped_storage()) == key
    assert private.storage_id(tensor.clone().untyped_storage()) != key
    storage.resize_(0)
    assert private.storage_id(tensor.untyped_storage()) == key


@canary("torch.real_tensors")
def test_real_tensors() -> None:
    with private.fake_tensors():
        assert private.is_fake(torch.ones(1))
        with private.real_tensors():
            assert torch.ones(2).sum().item() == 2
        assert private.is_fake(torch.ones(1))
    with private.real_tensors():
        assert torch.ones(2).sum().item() == 2


@canary("torch.step_hooks")
def test_step_hooks() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    hooks = private.step_hooks(optimizer)
    assert len(hooks) == 0
    optimizer.register_step_post_hook(lambda *_: None)
    assert len(private.step_hooks(optimizer)) == 1
    assert private.step_hooks(optimizer) is hooks
    assert private.step_hooks(object()) is None


@canary("torch.transforms_are_active")
def test_transforms_are_active() -> None:
    seen = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.transforms_are_active())
        return 2 * x

    x = torch.ones(2)
    watch(x)
    torch.func.vmap(watch)(x)
    torch.func.grad(lambda x: watch(x).sum())(x)
    torch.func.jvp(watch, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        watch(x)
    watch(x)
    assert seen == [False, True, True, True, True, False]


@canary("torch.is_expanded_weight")
def test_is_expanded_weight() -> None:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    seen = []
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda layer, _: seen.append(private.is_expanded_weight(layer.weight)))
    layer(torch.ones(3, 2))
    call_for_per_sample_grads(layer, batch_size=3)(torch.ones(3, 2))
    assert seen == [False, True]


@canary("torch.version_of")
def test_version_of() -> None:
    tensor = torch.zeros(1)
    before = private.version_of(tensor)
    tensor.add_(1)
    assert private.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert private.version_of(torch.zeros(1)) == 0


@canary("torch.preserve_versions")
def test_preserve_versions() -> None:
    tensor = torch.full((1,), 3.0)
    leaf = torch.ones(1, requires_grad=True)
    product = leaf * tensor
    with private.preserve_versions([tensor]):
        tensor.add_(1)
        tensor.sub_(1)
    product.backward()
    assert leaf.grad is not None
    assert leaf.grad.item() == 3
    product = leaf * tensor
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@canary("torch.is_mutable", "torch.written_arguments")
def test_what_an_operator_writes() -> None:
    aten = torch.ops.aten
    first, second, out = torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2)
    assert not private.is_mutable(aten.add.Tensor)
    assert private.written_arguments(aten.add.Tensor, (first, second), {}) == []
    assert private.is_mutable(aten.add_.Tensor)
    (written,) = private.written_arguments(aten.add_.Tensor, (first, second), {"alpha": 2})
    assert written is first
    (written,) = private.written_arguments(aten.mm.out, (first, second), {"out": out})
    assert written is out


@canary("torch.TorchDispatchMode", "torch.UNSAFE_VIEW")
def test_dispatch_mode_sees_operators() -> None:
    with Recorder() as recorder:
        torch.ones(2, 3, 4) @ torch.ones(4, 5)
    assert torch.ops.aten.mm.default in recorder.operators
    assert private.UNSAFE_VIEW in recorder.operators


@canary("torch.init_fake_process_group", "torch.awaits_collective")
@pytest.mark.usefixtures("fake_ranks")
def test_collectives_of_ranks_that_do_not_exist() -> None:
    assert (dist.get_rank(), dist.get_world_size()) == (0, 2)
    sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])
    assert sharded.to_local().shape == (2,)
    with Recorder() as recorder:
        assert sharded.full_tensor().shape == (4,)
    assert sum(map(private.awaits_collective, recorder.operators)) == 1


@canary("torch.parameters_of_integers")
def test_parameters_of_integers() -> None:
    integers = torch.ones(2, dtype=torch.uint8)
    with private.parameters_of_integers():
        assert not nn.Parameter(integers).requires_grad  # as FSDP2 makes them before PyTorch 2.12
        assert nn.Parameter(torch.ones(2)).requires_grad
        assert not nn.Parameter(torch.ones(2), requires_grad=False).requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(integers)


@canary("torch.GATHERING_OPERATORS", "torch.shards_copied_before_gathering")
@pytest.mark.usefixtures("fake_ranks")
def test_how_fsdp2_gathers() -> None:
    layer = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (2,)))
    layer(torch.ones(1, 4))  # the first forward initializes
    assert isinstance(layer, FSDPModule)
    recorders = []
    for context in (nullcontext(), private.shards_copied_before_gathering()):
        layer.reshard()
        with context, Recorder() as recorder:
            layer(torch.ones(1, 4))
        recorders.append(recorder)
    plain, copied = recorders
    assert {operator.name() for operator in plain.operators} >= private.GATHERING_OPERATORS
    assert copied.count("aten::clone") == plain.count("aten::clone") + len(list(layer.parameters()))


@canary("torch.non_persistent_buffers")
def test_non_persistent_buffers() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("computed", torch.ones(1), persistent=False)
    assert private.non_persistent_buffers(module) == {"computed"}


@canary("torch.clear_load_hooks")
def test_clear_load_hooks() -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("called")

    for register in ("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"):
        layer = nn.Linear(2, 2)
        getattr(layer, register)(refuse)
        with pytest.raises(RuntimeError, match="called"):
            layer.load_state_dict(layer.state_dict())
        private.clear_load_hooks(layer)
        layer.load_state_dict(layer.state_dict())


@canary("torch.apply_to_tensors")
def test_apply_to_tensors() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2, device="meta"))
    private.apply_to_tensors(module, lambda tensor: torch.ones_like(tensor, device="cpu"))
    tensors = [*module.parameters(), *module.buffers()]
    assert len(tensors) == 5
    assert all(bool((tensor == 1).all()) for tensor in tensors)


@canary("torch.fake_tensors", "torch.active_fake_mode", "torch.is_fake")
def test_fake_tensors() -> None:
    assert private.active_fake_mode() is None
    real = torch.ones(2)
    with private.fake_tensors():
        assert private.active_fake_mode() is not None
        fake = torch.ones(2**40)
        assert fake.device.type == "cpu"
        assert private.is_fake(fake[:2] + real)
        assert isinstance(private.storage_id(fake.untyped_storage()), int)
    assert not private.is_fake(real)


@canary("torch.WRAPPER_SEGMENTS")
@pytest.mark.usefixtures("fake_ranks")
def test_wrappers_add_these_segments() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    compiled: Any = torch.compile(nn.Linear(2, 2))
    sharded = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    wrapped = [compiled, checkpoint_wrapper(nn.Linear(2, 2)), sharded]
    for module in wrapped:
        modules = nn.ModuleDict({"layer": module}).named_modules()
        (path,) = [path for path, layer in modules if type(layer) is nn.Linear]
        assert path != "layer"
        assert clean_path(path) == "layer"
    found = {path for module in wrapped for path, _ in module.named_modules() if path}
    assert found == private.WRAPPER_SEGMENTS


@canary("torch.SHARD_LIST_CLASSES")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_list_of_shards_is_of_these_classes(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    class Noting(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if not isinstance(found := super().find_class(module, name), torch.dtype):
                named.add((module, name))
            return found

    named: set[tuple[str, str]] = set()
    save({"state": {"a": torch.ones(4, 2), "b": torch.tensor(3), "c": 1}}, checkpoint_id=tmp_path, no_dist=True)
    with (tmp_path / ".metadata").open("rb") as stream:
        listed = read_shard_list(stream, ".metadata")
        stream.seek(0)
        Noting(stream).load()
    paths = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
    known = {(module, name) for module, names in private.SHARD_LIST_CLASSES.items() for name in names}
    assert {item for item in known ^ named if item[1] not in paths} == set()
    assert list(listed.values) == ["state.c"]
    assert (listed.tensors["state.a"].size, listed.tensors["state.b"].size) == ((4, 2), ())
    (shard,) = listed.tensors["state.a"].shards
    content = (tmp_path / shard.place.file).read_bytes()[shard.place.start :][: shard.place.length]
    assert torch.equal(torch.load(io.BytesIO(content)), torch.ones(4, 2))


def test_every_function_has_a_canary() -> None:
    check_coverage("torch")
