"""What a run reads of a sharded checkpoint: bitwise what PyTorch's reader gives, and no code of a file runs."""

import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from paca_lightning import PaCAError
from paca_lightning.core.shard_lists import ListedTensor, Place, Shard, ShardList, read_shard_list
from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.restoring import check_files, load_directory
from paca_lightning.strategies.fsdp2.saving import save_directory
from paca_lightning.strategies.fsdp2.shard_reader import PlainPlanner, ShardReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class RunsCode:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.system, (f"mkdir {self.place}",)


def trained(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a model and its optimizer, as a run writes it."""
    model, optimizer = trained(1, steps=3)
    content = {
        "state_dict": get_model_state_dict(model),
        "optimizer_states": [get_optimizer_state_dict(model, optimizer)],
        "epoch": 3,
    }
    save_directory(content, Location.of(tmp_path / "last.ckpt"))
    return tmp_path / "last.ckpt"


def restore(place: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The rest of the checkpoint, and the states of a fresh model and optimizer that took it."""
    model, optimizer = trained(2, steps=1)
    rest = load_directory(Location.of(place), model, [optimizer], strict=True)
    return rest, model.state_dict(), optimizer.state_dict()


def test_a_model_and_its_optimizer_are_restored_bitwise(saved: Path) -> None:
    check_files(saved)
    rest, state, optimizer_state = restore(saved)
    model, optimizer = trained(1, steps=3)
    assert rest == {"epoch": 3}
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    expected = optimizer.state_dict()
    assert optimizer_state["param_groups"] == expected["param_groups"]
    for number, values in expected["state"].items():
        assert all(torch.equal(optimizer_state["state"][number][name], tensor) for name, tensor in values.items())


# -- What is refused


def code_in_the_list(directory: Path, target: Path) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(RunsCode(target)))


def code_inside_a_true_list(directory: Path, target: Path) -> None:
    listed = pickle.loads((directory / ".metadata").read_bytes())
    listed.planner_data = RunsCode(target)
    (directory / ".metadata").write_bytes(pickle.dumps(listed))


def code_in_a_list_of_one_rank(directory: Path, target: Path) -> None:
    """PyTorch falls back to this file where the list is damaged."""
    (directory / ".metadata").write_bytes(b"no pickle")
    (directory / "__0.metadata").write_bytes(pickle.dumps(RunsCode(target)))


def code_in_a_value(directory: Path, target: Path) -> None:
    """In place of the optimizer's learning rate, which is no tensor: PyTorch loads those without limits."""
    listed = pickle.loads((directory / ".metadata").read_bytes())
    place = listed.storage_data[MetadataIndex("optimizer_0.param_groups.0.lr")]
    buffer = io.BytesIO()
    torch.save(RunsCode(target), buffer)
    file = directory / place.relative_path
    place.offset, place.length = file.stat().st_size, buffer.tell()
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(listed))


HOSTILE = {
    code_in_the_list: r"\.metadata cannot be read: it names (posix|nt)\.system, which has no place in a list of shards",
    code_inside_a_true_list: r"\.metadata cannot be read: it names (posix|nt)\.system, which has no place",
    code_in_a_list_of_one_rank: r"\.metadata cannot be read",
    code_in_a_value: r"param_groups\.0\.lr' cannot be read: it holds an object of (posix|nt)\.system",
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    damage: Callable[[Path, Path], None], saved: Path, tmp_path: Path
) -> None:
    damage(saved, tmp_path / "ran")
    with pytest.raises(PaCAError, match=HOSTILE[damage]):
        restore(saved)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(PaCAError, match=r"is not what was saved \("):
        check_files(saved)


def test_these_files_run_code_where_pytorch_reads_them(saved: Path, tmp_path: Path) -> None:
    """So the test above would see it."""
    code_in_a_value(saved, tmp_path / "ran")
    model, optimizer = trained(2, steps=1)
    load({"optimizer_0": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=saved)
    assert (tmp_path / "ran").exists()


def test_no_class_is_changed_by_a_list(saved: Path) -> None:
    """A pickle can set attributes of the classes that it may name."""
    before = dict(vars(MetadataIndex))
    change = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadataIndex\nN}X\x03\x00\x00\x00fqnK\x01s\x86b."
    with pytest.raises(PaCAError, match="cannot be read"):
        read_shard_list(io.BytesIO(change), ".metadata")
    assert dict(vars(MetadataIndex)) == before
    pickle.loads(change)
    assert MetadataIndex.fqn == 1  # it does
    del MetadataIndex.fqn


def edited(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        listed = pickle.loads((directory / ".metadata").read_bytes())
        change(listed)
        (directory / ".metadata").write_bytes(pickle.dumps(listed))

    return edit


def weight(listed: Any) -> Any:
    return listed.storage_data[MetadataIndex("state_dict.weight", (0, 0))]


def without_weight(listed: Any) -> None:
    listed.state_dict_metadata["state_dict.weight"] = BytesStorageMetadata()
    listed.storage_data[MetadataIndex("state_dict.weight")] = listed.storage_data.pop(
        MetadataIndex("state_dict.weight", (0, 0))
    )


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (edited(lambda listed: setattr(weight(listed), "relative_path", "../a.distcp")), "names '../a.distcp'"),
        (edited(lambda listed: setattr(weight(listed), "relative_path", "..")), "names '..', which is no file"),
        (edited(lambda listed: setattr(weight(listed), "relative_path", "/dev/zero")), "names '/dev/zero'"),
        (edited(lambda listed: setattr(weight(listed), "offset", -1)), "are no sizes or places"),
        (edited(lambda listed: setattr(weight(listed), "length", 8)), "do not make up the tensor"),
        (edited(lambda listed: setattr(weight(listed), "transform_descriptors", ["zstd"])), "compressed"),
        (edited(lambda listed: listed.storage_data.popitem()), "do not make up|cannot be read"),
        (edited(without_weight), "is a tensor here and none in the checkpoint"),
        (lambda path: (path / ".metadata").unlink(), r"\.metadata cannot be read"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b""), "is cut off"),
    ],
)
def test_a_damaged_list_is_refused(damage: Callable[[Path], Any], complaint: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(PaCAError, match=complaint):
        restore(saved)


def test_a_list_that_the_checksums_do_not_name_is_refused(saved: Path) -> None:
    (saved / "checksums.json").write_text('{"algorithm": "xxh3_128", "files": {}}')
    with pytest.raises(PaCAError, match=re.escape("has none of '.metadata'")):
        check_files(saved)


# -- Shards of many ranks


def listed_as(size: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> bytes:
    """A list of one tensor, as PyTorch pickles it."""
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    place = vars(filesystem)["_StorageInfo"]
    parts = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    return pickle.dumps(
        Metadata(
            {"a": TensorStorageMetadata(TensorProperties(torch.uint8), torch.Size(size), parts)},
            storage_data={MetadataIndex("a", chunk[0]): place("a", 99 * n, 99) for n, chunk in enumerate(chunks)},
        )
    )


ROWS = [((0, 0), (2, 4)), ((2, 0), (2, 4)), ((4, 0), (1, 4))]
GRID = [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (3, 2)), ((2, 2), (3, 2))]


@pytest.mark.parametrize("chunks", [ROWS, GRID, [*ROWS, ((5, 0), (0, 4))], [((0, 0), (5, 4))]])
def test_shards_that_make_up_a_tensor_are_listed(chunks: Any) -> None:
    listed = read_shard_list(io.BytesIO(listed_as((5, 4), *chunks)), "list").tensors["a"]
    assert [(shard.offsets, shard.sizes) for shard in listed.shards] == chunks


@pytest.mark.parametrize(
    "chunks",
    [
        ROWS[:2],
        [ROWS[0], ((1, 0), (2, 4)), ROWS[2]],  # rows twice, and none of others
        [*GRID[:3], ((1, 2), (3, 2))],
        [*ROWS[:2], ((5, 0), (1, 4))],  # outside
        [((0, 0), (5, 4)), ((0, 0, 0), (0, 4, 1))],
    ],
)
def test_shards_that_do_not_are_refused(chunks: Any) -> None:
    with pytest.raises(PaCAError, match="the shards of 'a' do not make up the tensor"):
        read_shard_list(io.BytesIO(listed_as((5, 4), *chunks)), "list")


def test_each_part_goes_to_its_place(tmp_path: Path) -> None:
    """The shards of four ranks in a grid, read as one tensor."""
    whole = torch.arange(20.0).view(5, 4)
    content, shards = b"", []
    for (top, left), (rows, columns) in GRID:
        buffer = io.BytesIO()
        torch.save(whole[top : top + rows, left : left + columns].clone(), buffer)
        shards.append(Shard((top, left), (rows, columns), Place("a", len(content), buffer.tell())))
        content += buffer.getvalue()
    (tmp_path / "a").write_bytes(content)
    listed = ShardList({"a": ListedTensor((5, 4), torch.float32, shards)}, {})
    state: dict[str, Tensor] = {"a": torch.zeros(5, 4)}
    load(state, storage_reader=ShardReader(Location.of(tmp_path), listed), planner=PlainPlanner())
    assert torch.equal(state["a"], whole)
