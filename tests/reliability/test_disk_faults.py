"""A disk that is full, read-only or gone: one PaCAError, and nothing half-written under a final name."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paca_lightning import PaCAError
from paca_lightning.core.files import disk_error, replacing, written_aside
from paca_lightning.strategies.checkpoint_io import LocalCheckpointIO
from paca_lightning.strategies.fsdp2.saving import restore_replaced
from tests.processes import run
from tests.reliability.full_disk import full_disk
from tests.reliability.killed_runs import preloaded
from tests.reliability.writers import WRITERS, checkpoint, sharded_checkpoint
from tests.test_cli import DEBUG, ROOT, failure, output_to

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory that are not hidden, and what is in them."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    shown = [path for path in files if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    return {str(path.relative_to(directory)): path.read_bytes() for path in shown}


@pytest.mark.parametrize("room", [0, 1000, 6000])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
def test_a_full_disk_is_one_error_and_no_file(writer: Callable[[Path], None], room: int, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"could not be written.*File too large|cannot be written"), full_disk(room):
        writer(tmp_path / "place")
    assert content(tmp_path) == {}
    writer(tmp_path / "place")
    before = content(tmp_path)
    with pytest.raises(PaCAError), full_disk(room):
        writer(tmp_path / "place")
    assert content(tmp_path) == before
    writer(tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]  # nothing was left of the failures


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler and Linux")
def test_a_disk_that_fills_midway_is_one_error_and_changes_nothing(tmp_path: Path) -> None:
    """ENOSPC of the system, after a part of the bytes went to the disk."""
    environment = preloaded() | {"FAULTY_DISK": str(tmp_path)}
    done = run([sys.executable, "-m", "tests.reliability.filled_disk", str(tmp_path)], directory=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    tries = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in tries] == [name for name in WRITERS for _ in range(3)]
    for name, share, needed, said, unchanged, left in tries:
        assert needed > 1000, name
        assert "No space left on device" in said, (name, share, said)
        assert unchanged, (name, share)
        # A sharded checkpoint's part stays hidden until the next save, as another rank may still write to it.
        assert left in ([], [".place.partial"] if name == "sharded checkpoint" else []), (name, share)


@pytest.mark.filterwarnings("ignore:The adapter could not be saved")
def test_a_run_on_a_full_disk_ends_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["fit", *DEBUG, *output_to(tmp_path), "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]
    with full_disk(20_000):  # config and metrics fit, the checkpoint does not
        code, message = failure(arguments, capsys)
    assert code == 2
    assert "step=2.ckpt' could not be written: [Errno 27] File too large. What was there before is unchanged" in message
    assert "Traceback" not in message
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_logs_on_a_full_disk_end_the_run_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lightning.fabric.loggers.csv_logs.csv.DictWriter.writerows", full)
    arguments = ["fit", *DEBUG, *output_to(tmp_path), "--trainer.limit_train_batches=5", "--trainer.max_epochs=1"]
    code, message = failure(arguments, capsys)
    assert code == 2
    assert "A file of the run could not be written: [Errno 28] No space left on device" in message


@pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
def test_files_are_renamed_within_their_file_system(
    writer: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the temporary directory is: a rename from there may be a copy, piece by piece."""
    monkeypatch.setattr("tempfile.tempdir", "/dev/shm" if Path("/dev/shm").is_dir() else None)
    renamed: list[tuple[Path, Path]] = []
    original = os.rename

    def rename(source: Any, target: Any, **options: Any) -> None:
        renamed.append((Path(source), Path(target)))
        original(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(shutil, "move", None)
    (tmp_path / "below").mkdir()
    writer(tmp_path / "below" / "place")
    assert renamed
    assert all(source.is_relative_to(tmp_path / "below") for source, _ in renamed)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
def test_an_output_that_vanished_is_created_again(writer: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    writer(tmp_path / "below" / "place")
    before = content(tmp_path)
    shutil.rmtree(tmp_path / "below")
    writer(tmp_path / "below" / "place")
    assert content(tmp_path).keys() == before.keys()


def vanishing(directory: Path) -> None:
    with written_aside(directory) as scratch:
        (scratch / "file").write_text("text")
        shutil.rmtree(directory.parent)


def test_a_directory_that_vanishes_while_it_is_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"could not be written: .*No such file or directory"):
        vanishing(tmp_path / "a" / "adapter")


@pytest.mark.parametrize("writer", [checkpoint, sharded_checkpoint])
def test_what_killed_processes_left_is_removed(writer: Callable[[Path], None], tmp_path: Path) -> None:
    left = 2**22 + 1  # beyond the largest process id
    with replacing(tmp_path / "place") as temporary:
        name = temporary.name
        temporary.touch()
    (tmp_path / name.replace(str(os.getpid()), str(left))).write_text("half")
    (tmp_path / ".place.partial").mkdir()
    checkpoint(tmp_path / "place")
    sharded_checkpoint(tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_files_of_running_processes_stay(tmp_path: Path) -> None:
    with replacing(tmp_path / "place") as one:
        one.touch()
    other = one.with_name(one.name.replace(str(os.getpid()), str(os.getppid())))
    other.touch()
    checkpoint(tmp_path / "place")
    assert other.exists()


def test_a_sharded_checkpoint_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two renames, the old one has another name, and gets its own back."""
    place = tmp_path / "last.ckpt"
    sharded_checkpoint(place)
    before = content(tmp_path)
    original = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        sharded_checkpoint(place)
    assert not place.exists()
    restore_replaced(place)
    assert content(tmp_path) == before


def test_a_removed_checkpoint_directory_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "epoch=1.ckpt"
    sharded_checkpoint(place)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before any file is removed
    LocalCheckpointIO().remove_checkpoint(place)
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "[Errno 122] Disk quota exceeded"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("a bug"), None),
        (ConnectionError("no hub"), None),
    ],
)
def test_errors_of_the_disk_are_told_from_others(error: Exception, says: str | None) -> None:
    assert disk_error(error) == says
