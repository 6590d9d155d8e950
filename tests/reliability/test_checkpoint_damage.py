"""Bits of a checkpoint that changed since it was saved: refused by name, or without any effect."""

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from paca_lightning import PaCAError
from paca_lightning.cli import main
from paca_lightning.core.sealed_files import CHECKSUMS
from paca_lightning.strategies.checkpoint_io import LocalCheckpointIO
from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.restoring import check_files
from paca_lightning.strategies.fsdp2.saving import save_directory
from tests.distributed_launch import launch
from tests.reliability.writers import sharded_checkpoint
from tests.test_cli import DEBUG, ROOT, failure, output_to

CONTENT = {"state_dict": {"delta": torch.arange(40.0)}, "epoch": 3, "loops": {"a": [1, 2, "three"]}}


def flipped(content: bytes, every: int) -> Iterator[bytes]:
    """Copies of some bytes, each with one bit flipped, at every n-th byte."""
    for place in range(0, len(content), every):
        copy = bytearray(content)
        copy[place] ^= 1 << place % 8
        yield bytes(copy)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else bool(left == right)


def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    file, refused, total = tmp_path / "last.ckpt", 0, 0
    LocalCheckpointIO().save_checkpoint(CONTENT, file)
    for damaged in flipped(file.read_bytes(), every=3):
        file.write_bytes(damaged)
        total += 1
        try:
            loaded = LocalCheckpointIO().load_checkpoint(file)
        except PaCAError:
            refused += 1
        else:
            assert same(loaded, CONTENT)
    assert 100 < refused < total  # the rest is padding, and dates that nobody reads


class RunsCode:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a debug run of two steps."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        patched.setattr("sys.argv", ["paca-lightning"])
        main(["fit", *DEBUG, *output_to(directory), "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"])
    return next(directory.rglob("*.ckpt"))


def resumed(file: Path, directory: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What `fit` and `validate` say when they go on from a checkpoint that they refuse; both say the same."""
    said = {
        failure([command, *DEBUG, *output_to(directory), f"--ckpt_path={file}", *more], capsys)
        for command in ("fit", "validate")
    }
    ((code, message),) = said
    assert code == 2
    assert "Traceback" not in message
    assert not list(directory.rglob("*.ckpt"))
    return message


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/7"])
def test_a_run_does_not_go_on_from_changed_bits(
    record: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(trained) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"/{record}"))
        content = archive.read(name)
    whole = trained.read_bytes()
    middle = whole.index(content) + len(content) // 2
    file = tmp_path / "damaged.pt"
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :])
    message = resumed(file, tmp_path, capsys)
    assert f"{file} is not what was saved: its record {name!r} was damaged or changed since" in message


def test_a_checkpoint_that_brings_code_is_refused_and_runs_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    content = torch.load(trained, weights_only=True)
    content["hyper_parameters"] = {"model": RunsCode(f"touch {tmp_path / 'ran'}")}
    file = tmp_path / "foreign.pt"
    torch.save(content, file)
    message = resumed(file, tmp_path, capsys)
    assert f"The checkpoint '{file}' cannot be read: it holds an object of posix.system" in message
    assert not (tmp_path / "ran").exists()


def test_urls_are_read_without_code_too(tmp_path: Path) -> None:
    """Lightning's default for them is weights_only=False."""
    with fsspec.open("memory://foreign.ckpt", "wb") as file:
        torch.save({"state_dict": RunsCode(f"touch {tmp_path / 'ran'}")}, file)
    with pytest.raises(PaCAError, match=r"an object of posix\.system"):
        LocalCheckpointIO().load_checkpoint("memory://foreign.ckpt")
    assert not (tmp_path / "ran").exists()


def test_code_that_the_user_allows_runs(tmp_path: Path) -> None:
    torch.save({"state_dict": RunsCode(f"touch {tmp_path / 'ran'}")}, tmp_path / "own.ckpt")
    LocalCheckpointIO().load_checkpoint(tmp_path / "own.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()


SHARDED_FILES = [".metadata", "__0_0.distcp", "meta.pt", "checksums.json"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", SHARDED_FILES[:3])
def test_a_flipped_bit_in_a_sharded_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    place = tmp_path / "last.ckpt"
    sharded_checkpoint(place)
    assert sorted(path.name for path in place.iterdir()) == sorted(SHARDED_FILES)
    check_files(place)
    whole = (place / name).read_bytes()
    for damaged in flipped(whole, every=max(1, len(whole) // 50)):
        (place / name).write_bytes(damaged)
        with pytest.raises(PaCAError, match=re.escape(str(place))):
            check_files(place)
    (place / name).write_bytes(whole)
    check_files(place)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_sharded_checkpoint_without_checksums_loads_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / CHECKSUMS).unlink()
    check_files(tmp_path / "last.ckpt")
    assert "has no checksums.json, as earlier versions wrote none: its bytes are not verified" in caplog.text


def refusal_of_damage(place: Path) -> tuple[list[str], str]:
    """Saves on all ranks, damages a file of the second rank, and says which files there are and what loading says."""
    tensor = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    save_directory({"state_dict": {"delta": tensor}}, Location.of(place))
    names = sorted(path.name for path in place.iterdir())
    check_files(place)
    dist.barrier()
    if dist.get_rank() == 0:
        (place / "__1_0.distcp").write_bytes(b"other")
    dist.barrier()
    with pytest.raises(PaCAError) as refused:
        check_files(place)
    return names, str(refused.value)


@pytest.mark.distributed
def test_every_rank_refuses_what_one_of_them_reads(tmp_path: Path) -> None:
    results = launch(refusal_of_damage, 2, tmp_path / "last.ckpt")
    names = [".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json", "meta.pt"]
    for found, message in results:
        assert found == names
        assert "last.ckpt/__1_0.distcp' is not what was saved (1 of 4 files differ from checksums.json)" in message
