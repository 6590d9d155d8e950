"""Histories: adapters along a training, a directory each, with what the run knew at that step in a JSON file."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from paca_lightning.adapters.files import CONFIG, read_json
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import replacing, told_if_the_disk_fails, written_aside

POINT, INDEX = "point.json", "history.json"
TOKENIZER = "tokenizer"
"""Directory of the tokenizer that all points share: in each point it could be larger than the adapter."""
SUPERSEDED = "superseded"
"""Directory of points that a run has left behind by going back to an earlier checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a run knew when it wrote an adapter.

    Attributes:
        step: Optimizer steps done.
        tokens: Tokens seen that were not padding, on all ranks since the run began; None if they were not counted.
        train_loss: Mean loss of the steps since the point before; None at the first one, and if a loss is not finite.
        held_out_loss: Of the last validation; None if there was none yet, or it was not finite.
        held_out_step: The step of that validation.
        epoch: The epoch of the data loader.
        batch: Batches of that epoch that are done.
        base: Checksum of the base model's fingerprint, which names the base model by its content.
    """

    step: int
    tokens: int | None
    train_loss: float | None
    held_out_loss: float | None
    held_out_step: int | None
    epoch: int
    batch: int
    base: str


class History:
    """The points of a history by step, and its directory: read when it is made, written point by point.

    Args:
        directory: Need not exist.

    Raises:
        PaCAError: If a file of it is damaged, or a point that its index names is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.points: dict[int, Point] = dict(_points(directory))
        indexed = _indexed_steps(directory)
        if missing := sorted(indexed - self.points.keys()):
            raise PaCAError(
                f"{directory}: step {missing[0]} is missing ({len(missing)} of the {len(indexed)} steps in {INDEX}). "
                f"Copy {step_name(missing[0])} back, or remove {INDEX} to go on with what is there."
            )

    def path(self, step: int) -> Path:
        """The adapter directory of a step."""
        return self.directory / step_name(step)

    def add(self, point: Point, save: Callable[[Path], None]) -> None:
        """Write a point; one of the same step is replaced.

        Args:
            point: Goes into the adapter's directory.
            save: Writes the adapter into a directory, which then appears whole under its name.
        """
        with written_aside(self.path(point.step)) as scratch:
            save(scratch)
            _write(scratch / POINT, asdict(point))
        self._note(point)

    def update(self, step: int, **changes: Any) -> None:
        """Change what is known of a point that is there."""
        point = replace(self.points[step], **changes)
        if point != self.points[step]:
            with replacing(self.path(step) / POINT) as temporary:
                _write(temporary, asdict(point))
            self._note(point)

    def set_aside_after(self, step: int) -> list[int]:
        """Move the points after a step to ``superseded``, where an earlier one of the same step is replaced.

        Returns:
            The steps.
        """
        later = sorted(number for number in self.points if number > step)
        with told_if_the_disk_fails(self.directory):
            for number in later:
                place = self.directory / SUPERSEDED / step_name(number)
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                self.path(number).rename(place)
                del self.points[number]
        if later:
            self._write_index()
        return later

    def take_over(self, other: "History", last: int) -> None:
        """Take the points of another history up to a step: linked where the file system can, else copied."""
        for step, point in sorted(other.points.items()):
            if step <= last and step not in self.points:
                self.add(point, partial(_link_files, other.path(step)))

    def _note(self, point: Point) -> None:
        self.points[point.step] = point
        self._write_index()

    def _write_index(self) -> None:
        with replacing(self.directory / INDEX) as temporary:
            _write(temporary, {"points": [asdict(self.points[step]) for step in sorted(self.points)]})


def read_history(directory: str | os.PathLike[str]) -> History:
    """A history that is there.

    Raises:
        PaCAError: If there is none, or it is damaged, or lacks a step.
    """
    path = Path(directory)
    if not path.is_dir():
        raise PaCAError(f"The history {str(path)!r} does not exist. AdapterHistory writes one along a training.")
    if (path / POINT).is_file() and (path.parent / INDEX).is_file():
        raise PaCAError(f"{str(path)!r} is one step of a history. Give the history: {str(path.parent)!r}.")
    history = History(path)
    if not history.points:
        raise PaCAError(
            f"{str(path)!r} holds no history: there is no {step_name(0)} or the like with a {POINT} in it. "
            "AdapterHistory writes them along a training."
        )
    return history


def step_name(step: int) -> str:
    """Name of a point's directory."""
    return f"step-{step:08d}"


def tokenizer_directory(adapter: str | os.PathLike[str]) -> Path | None:
    """Where the tokenizer of an adapter's training is: in its directory, or beside the points of its history."""
    path = Path(adapter)
    places = [path, *([path.parent / TOKENIZER] if (path / POINT).is_file() else [])]
    return next((place for place in places if (place / "tokenizer_config.json").is_file()), None)


def _points(directory: Path) -> Iterator[tuple[int, Point]]:
    for path in sorted(directory.glob("step-*")) if directory.is_dir() else ():
        if re.fullmatch(r"step-\d{8,}", path.name) and (path / POINT).is_file() and (path / CONFIG).is_file():
            point = _parsed(read_json(path / POINT), path / POINT)
            if step_name(point.step) != path.name:
                raise PaCAError(f"{path / POINT} is of step {point.step}: the directory was renamed. Rename it back.")
            yield point.step, point


def _indexed_steps(directory: Path) -> set[int]:
    """The steps that the index names; none without an index."""
    if not (directory / INDEX).is_file():
        return set()
    points = read_json(directory / INDEX).get("points")
    if not isinstance(points, list):
        raise PaCAError(f"{directory / INDEX} is damaged. Remove it: it is made anew from the steps beside it.")
    return {_parsed(entry, directory / INDEX).step for entry in points}


_OPTIONAL = {"tokens": int, "train_loss": float, "held_out_loss": float, "held_out_step": int}
_NEEDED = {"step": int, "epoch": int, "batch": int, "base": str}


def _parsed(content: Any, source: Path) -> Point:
    """A point from JSON.

    Raises:
        PaCAError: If it is damaged.
    """
    names = {field.name for field in fields(Point)}
    if not isinstance(content, dict) or content.keys() != names:
        raise PaCAError(f"{source} is damaged: a point has the fields {sorted(names)}. Copy it again.")
    for name, kind in (_OPTIONAL | _NEEDED).items():
        value = content[name]
        kinds = (int, float) if kind is float else kind
        if (value is None and name in _NEEDED) or not (value is None or isinstance(value, kinds)):
            raise PaCAError(f"{source} is damaged: {name} is {value!r}. Copy it again.")
    return Point(**content)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _link_files(source: Path, target: Path) -> None:
    """Link all files of a point into another directory, but for what is known of it, which is written anew."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(POINT), copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """Give a file a second name, so that it takes no space; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
