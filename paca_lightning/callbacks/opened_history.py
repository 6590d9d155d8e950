"""The history that a run goes on with: what is in its directory, checked and put in order before the first batch."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from paca_lightning.adapters.files import read_files
from paca_lightning.adapters.fingerprint import differing_layer
from paca_lightning.adapters.history import SUPERSEDED, TOKENIZER, History
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import written_aside
from paca_lightning.other_methods.adapted import AdaptedModel


def open_history(
    trainer: Trainer, directory: Path, before: Path | None, trained: AdaptedModel | dict[str, list[float]]
) -> History:
    """The history of a run, up to its present step. On the first rank alone.

    Args:
        trainer: About to train its first batch.
        directory: Of the history.
        before: Where the history of the run's checkpoint is, if there is one. If that is another directory, its points
            are taken over.
        trained: The model that a method beside PaCA adapted, or the fingerprint of PaCA's base model, by layer path.

    Raises:
        PaCAError: If the directory holds the history of another run, method or base model, or a history is damaged.
    """
    step, history = trainer.global_step, History(directory)
    if trainer.ckpt_path is None and any(number > step for number in history.points):
        raise PaCAError(
            f"AdapterHistory: {str(directory)!r} holds the history of an earlier run, up to step "
            f"{max(history.points)}. Resume that run (--ckpt_path last), give another dirpath, or remove the directory."
        )
    _check_origin(history, trained)
    if before is not None and before.is_dir() and before != directory:
        history.take_over(History(before), step)
    if moved := history.set_aside_after(step):
        rank_zero_info(
            f"AdapterHistory: steps {moved[0]} to {moved[-1]} ({len(moved)} adapters) are trained again. The old ones "
            f"are in {directory / SUPERSEDED}."
        )
    tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    if hasattr(tokenizer, "save_pretrained"):
        with written_aside(directory / TOKENIZER) as scratch:
            tokenizer.save_pretrained(scratch)
    return history


def _check_origin(history: History, trained: AdaptedModel | dict[str, list[float]]) -> None:
    if not history.points:
        return
    first = history.path(min(history.points))  # all are of one method and base model
    try:
        if isinstance(trained, AdaptedModel):
            trained.check_origin(str(first))
            return
        settings = read_files(first)[1]
    except PaCAError as error:
        raise PaCAError(f"AdapterHistory: the directory holds the history of another run. {error}") from error
    expected = None if settings is None else settings.fingerprint
    if expected is not None and (path := differing_layer(expected, trained)) is not None:
        raise PaCAError(
            f"AdapterHistory: {str(first)!r} was trained on another base model, or on other columns, than this run "
            f"trains; they differ most in {path!r}. Give another dirpath."
        )
