"""Sharded checkpoints at URLs are written, replaced and loaded through fsspec."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint

from paca_lightning import PaCAError, PaCAStrategy
from paca_lightning.strategies.fsdp2.location import Location
from tests.distributed_launch import launch
from tests.distributed_training import Run, TinyChat, make_trainer, whole_deltas


class Bucket(LocalFileSystem):
    """Stands in for an object store that several ranks reach: ``bucket:///path`` is the file ``/path``."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("bucket://"))


def half_and_rest(root: str, *, sharded: bool) -> dict[str, Any]:
    """Train five steps, replace an older checkpoint at a URL, and train five more steps from it."""
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    run = Run(steps=5, module={"by_step": True}, strategy={"save_distributed_checkpoint": sharded})
    saving = ModelCheckpoint(f"{root}/run", "last", every_n_train_steps=2, enable_version_counter=False)
    first = TinyChat(**run.module)
    trainer = make_trainer(run, callbacks=[PaCAStrategy(run.config), saving], enable_checkpointing=True)
    trainer.fit(first)
    url = f"{root}/run/last.ckpt"
    trainer.save_checkpoint(url)
    files = sorted(str(name).rpartition("/")[2] for name in fsspec.core.url_to_fs(url)[0].find(f"{root}/run"))
    second = TinyChat(**run.module)
    resumed = make_trainer(run, max_steps=10)
    resumed.fit(second, ckpt_path=url)
    if sharded and trainer.is_global_zero:
        (Location.of(url) / "meta.pt").remove()
    trainer.strategy.barrier()
    refusal = ""
    if sharded:
        with pytest.raises(PaCAError) as refused:
            make_trainer(run).fit(TinyChat(), ckpt_path=url)
        refusal = str(refused.value)
    return {
        "files": files,
        "losses": first.losses + second.losses,
        "deltas": whole_deltas(second),
        "refusal": refusal,
        "stray": os.listdir(),
    }


def straight() -> dict[str, Any]:
    run = Run(steps=10, module={"by_step": True}, strategy={})
    module = TinyChat(**run.module)
    make_trainer(run).fit(module)
    return {"losses": module.losses, "deltas": whole_deltas(module)}


def on_ranks(root: str, directory: Path) -> dict[str, Any]:
    os.chdir(directory)
    results = {name: half_and_rest(f"{root}/{name}", sharded=name == "directory") for name in ("directory", "file")}
    return results | {"straight": straight()}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_resumes_from_a_url(tmp_path: Path, ranks: int) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    root = "memory://store" if ranks == 1 else f"bucket://{tmp_path}/store"
    results = launch(on_ranks, ranks, root, empty)[0]
    expected = [".metadata", *(f"__{rank}_0.distcp" for rank in range(ranks)), "meta.pt"]
    assert results["directory"]["files"] == expected
    assert results["file"]["files"] == ["last.ckpt"]
    assert (
        "directory/run/last.ckpt' is neither a checkpoint file nor a directory with meta.pt"
        in (results["directory"]["refusal"])
    )
    for name in ("directory", "file"):
        assert results[name]["stray"] == []  # nothing like ./s3:/bucket
        assert results[name]["losses"] == results["straight"]["losses"]
        for path, delta in results["straight"]["deltas"].items():
            assert torch.equal(results[name]["deltas"][path], delta)


def test_locations() -> None:
    assert Location.of("s3x/a.ckpt").name == f"{Path.cwd()}/s3x/a.ckpt"
    for local in ("/a/b.ckpt", "file:///a/b.ckpt", Path("/a/b.ckpt")):
        assert (Location.of(local).name, Location.of(local).is_local) == ("/a/b.ckpt", True)
    remote = Location.of("memory://a/b.ckpt")
    assert ((remote / "meta.pt").name, remote.is_local) == ("memory://a/b.ckpt/meta.pt", False)
    with pytest.raises(PaCAError, match=r"'nowhere://a' cannot be reached: Protocol not known: nowhere"):
        Location.of("nowhere://a")
