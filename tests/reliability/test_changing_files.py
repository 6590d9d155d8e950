"""A base model whose files change while it is read, or while a run trains with it."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from paca_lightning import PaCAConfig, PaCAError, apply_paca
from paca_lightning.core.unchanged import Stamp
from paca_lightning.strategies.fsdp2.agreeing import check_same_files
from paca_lightning.strategies.fsdp2.materializing import materialize
from paca_lightning.strategies.fsdp2.rows import RowReader
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.pretrained import build_causal_lm
from tests.distributed_launch import launch
from tests.tiny import tiny_llama, tiny_model_directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_model_directory(tmp_path / "model")


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def replace(directory: Path) -> None:
    """Another file takes the name, with the same size and time, as from a copy that keeps times."""
    file = weights(directory)
    status = file.stat()
    save_file(
        {name: tensor + 1 for name, tensor in load_file(file).items()}, other := directory / "other", {"format": "pt"}
    )
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


def write(directory: Path) -> None:
    """Bytes of the same file change."""
    file = weights(directory)
    middle = file.stat().st_size // 2
    with file.open("r+b") as stream:
        stream.seek(middle)
        stream.write(b"\1" * 4096)
    os.utime(file, ns=(0, 0))  # at a time of its own, however coarse the file system's clock


def add(directory: Path) -> None:
    shutil.copy(weights(directory), directory / "model-00002.safetensors")


def remove(directory: Path) -> None:
    weights(directory).unlink()


def midway(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[[], None]) -> None:
    """Let a method work, and a file change after it."""
    method = getattr(owner, name)

    def changes(*arguments: Any, **settings: Any) -> Any:
        result = method(*arguments, **settings)
        monkeypatch.setattr(owner, name, method)
        change()
        return result

    monkeypatch.setattr(owner, name, changes)


@pytest.mark.parametrize("change", [replace, write, add, remove])
def test_a_model_that_changes_while_transformers_reads_it_is_refused(
    change: Callable[[Path], None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    midway(monkeypatch, AutoModelForCausalLM, "from_pretrained", lambda: change(directory))
    with pytest.raises(
        PaCAError, match=r"model.*\.safetensors' changed while the model was read, so its weights may be"
    ):
        build_causal_lm(str(directory))


def test_the_change_is_told_where_the_reader_fails_of_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        remove(directory)
        raise OSError("no such file")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(PaCAError, match=r"model\.safetensors' changed while the model was read"):
        build_causal_lm(str(directory))


@pytest.mark.parametrize("change", [replace, write, remove])
def test_a_model_that_changes_while_rows_are_read_is_refused(
    change: Callable[[Path], None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    vars(model)["checkpoint_directory"] = str(directory)
    midway(monkeypatch, RowReader, "read", lambda: change(directory))
    with pytest.raises(PaCAError, match=r"model\.safetensors' changed while the model was read"):
        materialize(model, torch.device("cpu"))


def test_a_run_on_the_cpu_keeps_its_weights_when_the_file_is_written_over(directory: Path) -> None:
    module = CausalLMModule(str(directory))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    write(directory)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    mapped = build_causal_lm(str(tiny_model_directory(directory.parent / "mapped")))
    before = {name: tensor.clone() for name, tensor in mapped.state_dict().items()}
    write(directory.parent / "mapped")
    assert not all(torch.equal(tensor, before[name]) for name, tensor in mapped.state_dict().items())  # or why copy


def opened_by_turns(directory: Path) -> str:
    """What ranks say that open a model one after the other, while another one takes its place in between."""
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            reader = RowReader(directory)
            if rank == 0:
                replace(directory)
        dist.barrier()
    with pytest.raises(PaCAError) as refused:
        check_same_files(reader.stamps)
    return str(refused.value)


def copies_of_hosts(directory: Path) -> str:
    """What ranks of two hosts say: of equal copies, then of copies of different sizes."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("socket.gethostname", lambda: f"host{rank}")
        file = directory / f"of-{rank}" / "model.safetensors"
        check_same_files({file: Stamp(1, rank, 100, rank)})
        with pytest.raises(PaCAError) as refused:
            check_same_files({file: Stamp(1, rank, 100 + rank, rank)})
    return str(refused.value)


def on_ranks(directory: Path) -> tuple[str, str]:
    dist.init_process_group("gloo")
    return opened_by_turns(directory), copies_of_hosts(directory)


@pytest.mark.distributed
def test_ranks_that_opened_different_files_all_refuse_them(directory: Path) -> None:
    for by_turns, of_hosts in launch(on_ranks, 2, directory):
        assert re.search(r"model\.safetensors' changed while the model was read", by_turns)
        assert "The hosts host0, host1 have different files of the base model: 'model.safetensors' differs" in of_hosts
