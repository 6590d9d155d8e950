"""Finds the newest or the best checkpoint of a run's earlier versions: ``--ckpt_path last`` and ``best``."""

import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from paca_lightning.core.checkpoints import METADATA, is_checkpoint_directory, read_safely
from paca_lightning.core.errors import PaCAError
from paca_lightning.strategies.fsdp2.saving import replaced_checkpoints, restore_replaced

WORDS = ("last", "best")
CLOCKS_DIFFER = 60 * 10**9
"""Nanoseconds by which the clocks of a host and of a file server may differ."""
MODEL_CHECKPOINT = ModelCheckpoint.__qualname__
"""How its state's key begins in a checkpoint."""


def find_checkpoint(word: str, trainer: Trainer) -> Path:
    """The checkpoint that a word means, among those of the run's earlier versions.

    Lightning looks in the directory of the new version, where there is none yet, and then starts anew.

    Args:
        word: ``last``, the newest file or directory; or ``best``, the one that ModelCheckpoint's ``monitor`` names.
        trainer: Of the run, whose loggers and ModelCheckpoints say where it saves.

    Raises:
        PaCAError: If there is none, or nothing tells which is the best.
    """
    present = _present(trainer)
    found = present[0] if word == "last" else _best(present)
    rank_zero_info(f"--ckpt_path {word}: {found}")
    return found


def check_checkpoint(path: str) -> None:
    """Check a local path that the user gave.

    Raises:
        PaCAError: If nothing is there, or it is no checkpoint.
    """
    restore_replaced(Path(path))
    if not Path(path).exists():
        raise PaCAError(f"There is no checkpoint {path!r} (--ckpt_path).")
    if Path(path, "adapter_config.json").exists():
        raise PaCAError(
            f"{path!r} (--ckpt_path) is an adapter, no checkpoint of a run. PaCAStrategy takes it: "
            f"--trainer.callbacks=PaCAStrategy --trainer.callbacks.adapter={path}"
        )
    if Path(path).is_dir() and not is_checkpoint_directory(Path(path)):
        inside = ", ".join(sorted(found.name for found in checkpoints_in(Path(path)))) or "there is none"
        raise PaCAError(
            f"{path!r} (--ckpt_path) is a directory, and no sharded checkpoint. Name a checkpoint in it: {inside}."
        )
    if not is_sound(Path(path)):
        raise PaCAError(f"{path!r} (--ckpt_path) is no checkpoint, or was cut off.")


def is_sound(path: Path) -> bool:
    """Whether something is a checkpoint and was written to its end."""
    return is_checkpoint_directory(path) or (path.is_file() and zipfile.is_zipfile(path))


def checkpoints_in(directory: Path) -> list[Path]:
    """Files and directories in a directory that are named as checkpoints."""
    for place in replaced_checkpoints(directory):
        restore_replaced(place)
    return [path for path in directory.glob(f"*{ModelCheckpoint.FILE_EXTENSION}") if not path.name.startswith(".")]


def _present(trainer: Trainer) -> list[Path]:
    """All sound checkpoints, the newest first."""
    places = list(dict.fromkeys(_places(trainer)))
    found = [path for place in places for directory in _matching(place) for path in checkpoints_in(directory)]
    found = sorted(dict.fromkeys(found), key=_age, reverse=True)
    sound = [path for path in found if is_sound(path)]
    if sound and _age(sound[0])[0] > time.time_ns() + CLOCKS_DIFFER:
        rank_zero_warn(
            f"{sound[0]} is of a time that is still to come: the clock was set back, so that times do not tell which "
            "checkpoint is the newest. Taking the one with the most steps."
        )
        found = sound = sorted(sound, key=lambda path: int(read_rest(path).get("global_step", 0)), reverse=True)
    for path in found[: found.index(sound[0])] if sound else found:
        rank_zero_warn(f"{path} is cut off or no checkpoint: taking the one before it.")
    if not sound:
        raise PaCAError(
            f"There is no checkpoint to go on from (--ckpt_path). Looked for *{ModelCheckpoint.FILE_EXTENSION} in "
            f"{', '.join(map(str, places))}. Leave --ckpt_path out to begin anew, or give the path of a checkpoint."
        )
    return sound


def _places(trainer: Trainer) -> Iterator[Path]:
    """Directories to which this run's versions save, with ``*`` for the version."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            if callback.dirpath is not None:
                yield _local(callback.dirpath)
            elif trainer.loggers:
                logger = trainer.loggers[0]
                yield _local(logger.save_dir or trainer.default_root_dir) / str(logger.name) / "*" / "checkpoints"
            else:
                yield _local(trainer.default_root_dir) / "checkpoints"
    yield _local(trainer.default_root_dir)  # where Lightning saves before a SLURM job is requeued


def _local(directory: Any) -> Path:
    if "://" in str(directory):
        raise PaCAError(
            f"--ckpt_path last and best look for checkpoints on local disks only, and this run saves to "
            f"{str(directory)!r}. Give the path of a checkpoint."
        )
    return Path(directory)


def _matching(place: Path) -> list[Path]:
    if "*" not in place.parts:
        return [place]
    return list(place.parents[1].glob(f"*/{place.name}"))


def _age(path: Path) -> tuple[int, str]:
    file = path / METADATA if is_checkpoint_directory(path) else path
    return file.stat().st_mtime_ns, path.name


def _best(present: list[Path]) -> Path:
    """The best checkpoint, by the state of ModelCheckpoint in the newest one."""
    newest = present[0]
    for key, state in read_rest(newest).get("callbacks", {}).items():
        if key.startswith(MODEL_CHECKPOINT) and state.get("monitor") and state.get("best_model_path"):
            best = Path(state["best_model_path"])
            # Version, folder and name tell it from others, also where the run's directory was moved or copied.
            for path in present:
                if path.resolve().parts[-3:] == best.parts[-3:]:
                    return path
            if is_sound(best):
                return best
            raise PaCAError(f"--ckpt_path best: {str(best)!r} was the best checkpoint of {newest}, and is gone.")
    raise PaCAError(
        f"--ckpt_path best: the run that saved {newest} monitored nothing, so none of its checkpoints is the best. Add "
        "a ModelCheckpoint with monitor: val/loss to trainer.callbacks, or use --ckpt_path last."
    )


def read_rest(path: Path) -> dict[str, Any]:
    """What a checkpoint holds; of a sharded one, all but the tensors that are sharded.

    Raises:
        PaCAError: If it is damaged, or holds objects that are not safe to load.
    """
    return read_safely(path / METADATA if is_checkpoint_directory(path) else path, str(path))
