"""What this package asks of lm-eval: tasks by name, found before a model is loaded, and their results on a model."""

import logging
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError, did_you_mean
from paca_lightning.tools.quiet import quiet

SEED = 1234
"""lm-eval's own seed of few-shot examples."""


def check_installed() -> None:
    """Raise a PaCAError if lm-eval, or a part that it needs, is not installed."""
    try:
        with _quiet():
            import lm_eval.evaluator
            import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise PaCAError(
            f"eval needs lm-eval, which is not installed or not whole ({error}). Run: pip install "
            "'paca-lightning[eval]'."
        ) from error


def load_tasks(names: Sequence[str], include_path: str | None, num_fewshot: int | None) -> list[Any]:
    """lm-eval's tasks and groups, with their data.

    Args:
        names: Of tasks, groups or tags; patterns with ``*`` too.
        include_path: Directory with tasks of the user's own, as YAML files. If all names are there, lm-eval's own
            tasks, some 15,000 files, are not read.
        num_fewshot: Examples before each question. None: as the task says. A task that says 0 keeps it.

    Raises:
        PaCAError: If there is no such task, its data cannot be reached, or it cannot be run here.
    """
    if not names:
        raise PaCAError("There is no task. Give some: --tasks arc_easy hellaswag.")
    if include_path is not None and not Path(include_path).is_dir():
        raise PaCAError(f"--include_path: {include_path!r} is no directory.")
    manager = _manager(include_path, include_path is None)
    if include_path is not None and not all(manager.match_tasks([name]) for name in names):
        manager = _manager(include_path, True)
    found = []
    for name in names:
        matched = manager.match_tasks([name])
        if not matched:
            where = "" if include_path is None else f" or in {include_path!r}"
            raise PaCAError(
                f"There is no task {name!r} in lm-eval{where}.{did_you_mean(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists them."
            )
        for each in matched:
            loaded = _loaded(manager, each)
            for task in loaded["tasks"].values():
                _prepare(task, num_fewshot)
            found += [*loaded["groups"].values()][:1] or [*loaded["tasks"].values()]
    return found


@cache
def _manager(include_path: str | None, own: bool) -> Any:
    """lm-eval's index of tasks: those of a directory, and its own if they are wanted."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=include_path, include_defaults=own)


def _loaded(manager: Any, name: str) -> Any:
    try:
        with _quiet():
            return manager.load([name])
    except Exception as error:  # of data sets, of their hub, and of code that comes with tasks
        lost = isinstance(error, ConnectionError) or "Hub" in str(error)
        remedy = (
            "Run it once on a connected machine: the data stay in Hugging Face's cache (HF_HOME), which can be copied. "
            "Or give tasks with local files: --include_path."
            if lost
            else "Relative paths of data in a task count from where the command runs."
        )
        message = f"{type(error).__name__}: {str(error).strip()}"
        raise PaCAError(f"The data of task {name!r} cannot be loaded ({message}). {remedy}") from error


def _prepare(task: Any, num_fewshot: int | None) -> None:
    """Settings of a task as lm-eval's command line makes them.

    Raises:
        PaCAError: If it cannot be run here.
    """
    name = task.config.task
    for refused, kind in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "asks about images")):
        if getattr(task, refused, False):
            raise PaCAError(f"Task {name!r} {kind}, which eval does not do. Use the lm-eval command on a merged model.")
    default = task.get_config("num_fewshot")
    if num_fewshot is None or default == 0:
        task.set_config(key="num_fewshot", value=default or 0)
    else:
        task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=SEED)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    *,
    limit: int | None,
    batch_size: int,
    chat_template: bool,
) -> dict[str, Any]:
    """lm-eval's results of a model that is in memory.

    Args:
        model: In eval mode, on its device.
        tokenizer: Of the model.
        tasks: From ``load_tasks``; they may be used for several models.
        limit: Examples of each task; None: all.
        batch_size: Sequences of a forward.
        chat_template: Whether prompts are put into the tokenizer's chat template.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(SEED)
    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        loaded = TaskManager(include_defaults=False).load(tasks)
        results: dict[str, Any] = evaluate(
            wrapped, loaded, limit=limit, log_samples=True, apply_chat_template=chat_template, fewshot_as_multiturn=True
        )
    return results


def _quiet() -> AbstractContextManager[None]:
    """Without lm-eval's advice for its own command line; errors stay."""
    return quiet("lm_eval", logging.ERROR)
