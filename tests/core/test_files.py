"""Files are written aside and renamed; a directory that cannot be written is found early."""

import os
from pathlib import Path

import pytest

from paca_lightning import PaCAError
from paca_lightning.core.files import check_writable, written_aside


def fail_halfway(directory: Path) -> None:
    with written_aside(directory) as scratch:
        (scratch / "one.txt").write_text("half")
        raise RuntimeError("the disk is full")


def test_a_new_directory_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "adapter"
    with written_aside(target) as scratch:
        (scratch / "one.txt").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["one.txt"]

    with pytest.raises(RuntimeError, match="disk"):
        fail_halfway(tmp_path / "runs" / "broken")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["adapter"]


def test_files_of_the_same_name_are_replaced_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with written_aside(tmp_path) as scratch:
        (scratch / "one.txt").write_text("new")
        assert (tmp_path / "one.txt").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one.txt": "new", "notes.txt": "mine"}


def test_directories_of_the_same_name_are_replaced_too(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with written_aside(tmp_path) as scratch:
            (scratch / "templates").mkdir()
            (scratch / "templates" / f"{text}.txt").write_text(text)
    assert [path.name for path in (tmp_path / "templates").iterdir()] == ["new.txt"]


def test_what_is_superseded_goes_once_the_new_files_are_there(tmp_path: Path) -> None:
    for name in ("part-1.txt", "part-2.txt", "notes.txt"):
        (tmp_path / name).write_text("old")
    with pytest.raises(RuntimeError, match="disk"), written_aside(tmp_path, supersedes=["part-*.txt"]):
        raise RuntimeError("the disk is full")
    assert len(list(tmp_path.iterdir())) == 3
    with written_aside(tmp_path, supersedes=["part-*.txt"]) as scratch:
        (scratch / "part-1.txt").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"part-1.txt": "new", "notes.txt": "old"}


def test_an_existing_directory_keeps_its_files_when_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("old")
    with pytest.raises(RuntimeError, match="disk"):
        fail_halfway(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one.txt": "old"}


def test_renames_never_cross_into_an_existing_directory_that_may_be_a_mount(tmp_path: Path) -> None:
    with written_aside(tmp_path) as scratch:
        assert scratch.parent == tmp_path


def test_the_directory_has_the_permissions_that_mkdir_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with written_aside(tmp_path / "ours"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("directory", ["file", "file/below", "file/below/deeper"])
def test_a_directory_that_cannot_be_written_is_refused_by_name(tmp_path: Path, directory: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PaCAError, match=rf"^output: '.*{directory}' cannot be written \(Not a directory at '.*file'\)"):
        check_writable(tmp_path / directory, "output")
    with pytest.raises(PaCAError, match="cannot be written"), written_aside(tmp_path / directory):
        pytest.fail("The block must not run.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PaCAError, match=r"cannot be written \(Permission denied at '.*locked'\)"):
        check_writable(tmp_path / "locked" / "adapter", "output")


def test_checking_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "output")
    assert list(tmp_path.iterdir()) == []
