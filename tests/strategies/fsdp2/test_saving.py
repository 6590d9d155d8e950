"""A sharded checkpoint that cannot be written: all ranks say so, and the one before it is still there."""

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from paca_lightning import PaCAError
from paca_lightning.strategies.fsdp2 import saving
from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.saving import restore_replaced, save_directory
from tests.distributed_launch import launch

FULL = OSError(errno.ENOSPC, "No space left on device")


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Quota(LocalFileSystem):
    """Stands in for an object store, ``quota:///path``, that refuses a file."""

    protocol = "quota"
    refused = ""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("quota://"))

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        if "w" in mode and self.refused and self.refused in path:
            raise FULL
        return super()._open(path, mode, **settings)

    def mv(self, path1: str, path2: str, **settings: Any) -> None:
        if self.refused == "mv" and path1.endswith(".partial"):
            raise FULL
        super().mv(path1, path2, **settings)


@pytest.fixture
def quota() -> Iterator[type[Quota]]:
    fsspec.register_implementation("quota", Quota, clobber=True)
    yield Quota
    Quota.refused = ""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("refused", ["__0_0.distcp", ".metadata", "meta.pt", "mv"])
def test_a_failure_at_a_url_leaves_a_checkpoint(tmp_path: Path, quota: type[Quota], refused: str) -> None:
    location = Location.of(f"quota://{tmp_path}/last.ckpt")
    save_directory({"state_dict": {"delta": torch.zeros(4)}, "epoch": 1}, location)
    first = content(tmp_path / "last.ckpt")
    second = {"state_dict": {"delta": torch.ones(4)}, "epoch": 2}
    quota.refused = refused
    with pytest.raises(PaCAError, match=r"last.ckpt' could not be written by rank 0: .*No space left") as told:
        save_directory(second, location)
    if refused == "mv":  # an object store copies, so the old one is removed before
        assert f"The new checkpoint is complete: at 'quota://{tmp_path}/.last.ckpt.partial'" in str(told.value)
        assert content(tmp_path / ".last.ckpt.partial").keys() == first.keys()
    else:
        assert "What was there before is unchanged" in str(told.value)
        assert content(tmp_path / "last.ckpt") == first
    quota.refused = ""
    for _ in range(2):  # the first one leaves a complete checkpoint beside it, if there is one
        save_directory(second, location)
    assert content(tmp_path / "last.ckpt").keys() == first.keys()
    assert content(tmp_path / "last.ckpt") != first
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def last_rename_fails() -> AbstractContextManager[Any]:
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if Path(target).name == "last.ckpt":
            raise FULL
        return rename(path, target)

    return mock.patch.object(Path, "rename", failing)


FAILURES = {
    "meta.pt": lambda: mock.patch.object(Location, "open", side_effect=FULL),
    "checksums.json": lambda: mock.patch.object(saving, "write_checksums", side_effect=FULL),
    "the last rename": last_rename_fails,
}
"""What only the first rank writes."""


def failures_of_the_first_rank(place: Path) -> dict[str, str]:
    """What this rank says of each failure, after which the checkpoint is as it was."""
    mesh = init_device_mesh("cpu", (2,))
    old, new = ({"state_dict": {"delta": distribute_tensor(torch.full((4, 2), n), mesh, [Shard(0)])}} for n in (1.0, 2))
    save_directory(old, Location.of(place))
    before, said = content(place), {}
    for name, failing in FAILURES.items():
        dist.barrier()
        with failing() if dist.get_rank() == 0 else mock.MagicMock(), pytest.raises(PaCAError) as told:
            save_directory(new, Location.of(place))
        said[name] = str(told.value)
        restore_replaced(place)  # as loading does
        dist.barrier()
        assert content(place) == before
    return said


@pytest.mark.distributed
def test_all_ranks_tell_a_failure_of_the_first_one(tmp_path: Path) -> None:
    first, second = launch(failures_of_the_first_rank, 2, tmp_path / "last.ckpt")
    assert first == second
    assert first.keys() == FAILURES.keys()
    for message in first.values():
        assert "last.ckpt' could not be written by rank 0: [Errno 28] No space left on device. " in message
    assert "The new checkpoint is complete: at " in first["the last rename"]
