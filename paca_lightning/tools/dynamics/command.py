"""The command ``dynamics``: its options, what they ask for, and the files that it writes."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from paca_lightning.adapters.history import History, read_history
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable, replacing
from paca_lightning.tools.dynamics.movement import Movement, movements, updates_of, whole_movement
from paca_lightning.tools.dynamics.options import PROG, options
from paca_lightning.tools.dynamics.page import page
from paca_lightning.tools.dynamics.plots import by_kind, draw, lines, shares
from paca_lightning.tools.dynamics.points import Measured, Measurement, adapter_checksum
from paca_lightning.tools.dynamics.recitation import LONGEST, SHORTEST, excerpts_of
from paca_lightning.tools.dynamics.row_sets import parse_files, row_sets
from paca_lightning.tools.dynamics.run import config_beside, method_of, read_run
from paca_lightning.tools.dynamics.store import Store
from paca_lightning.tools.dynamics.tables import Row, print_steps, recited_rows, step_rows, write_csv
from paca_lightning.tools.environment import describe_environment

RECITED_COLUMNS = ("first_step", "at_last_step", "file", "row", "tokens", "context", "continuation")


def main(arguments: Sequence[str]) -> None:
    """Run ``paca-lightning dynamics``.

    Args:
        arguments: Its own options, and what ``fit`` takes to override the config.

    Raises:
        PaCAError: If an option, the history or the config cannot be used, or the base model is another one.
    """
    known, overrides = options().parse_known_args(arguments)
    for name in ("k", "limit"):
        if getattr(known, name) < 0:
            raise PaCAError(f"--{name} must not be negative, not {getattr(known, name)}.")
    files = parse_files(known.rows)
    history = read_history(known.history)
    steps = _steps(history, known.steps)
    output = Path(known.output) if known.output is not None else history.directory.absolute().parent / "dynamics"
    check_writable(output, "--output")
    module, datamodule, trainer = read_run(config_beside(history.directory, known.config), overrides)
    sets = row_sets(datamodule, files, known.limit)
    measured = [Measured(rows, excerpts_of(rows.token_rows(), known.k)) for rows in sets]
    notes = _notes(known, measured, shlex.join([PROG, *arguments]))
    if (method := method_of(trainer)) is not None:
        notes.insert(-1, f"Left out: how columns moved, as {type(method).__name__} trains none.")
    Console(stderr=True).print(*notes[1:-1], sep="\n", highlight=False, soft_wrap=True)
    store = Store(output / "points")
    Measurement(history, module, trainer, store, known.k).measure(measured, steps)
    layers, whole = _moved(history, steps, store) if method is None else ({}, {})
    rows = step_rows({step: history.points[step] for step in steps}, measured, layers, whole)
    recited = recited_rows(measured[0], datamodule.tokenizer)
    print_steps(rows, [one.rows.name for one in measured], Console())
    for path in _write(output, history, rows, layers, recited, notes):
        print(path)


def _steps(history: History, given: list[int] | None) -> list[int]:
    if given is None:
        return sorted(history.points)
    if missing := sorted(set(given) - history.points.keys()):
        there = ", ".join(map(str, sorted(history.points)))
        raise PaCAError(f"--steps: step {missing[0]} is not in {str(history.directory)!r}. There are {there}.")
    return sorted(set(given))


def _moved(
    history: History, steps: Sequence[int], store: Store
) -> tuple[dict[int, list[Movement]], dict[int, tuple[float, float | None]]]:
    """How each layer moved, and all together, by step; the last step of the history is the direction."""
    final = max(history.points)
    names = {step: adapter_checksum(history.path(step)) for step in {*steps, final}}
    layers: dict[int, list[Movement]] = {}
    whole: dict[int, tuple[float, float | None]] = {}
    last = None
    console = Console(stderr=True)
    for step in track(steps, "how far columns moved", console=console, transient=True):
        key = {"measure": "movement", "adapter": names[step], "last": names[final]}
        if (result := store.get(step, key)) is None:
            last = updates_of(history.path(final)) if last is None else last
            updates = updates_of(history.path(step))
            result = {"layers": movements(updates, last), "whole": whole_movement(updates, last)}
            store.put(step, key, result)
        layers[step], whole[step] = result["layers"], tuple(result["whole"])
    return layers, whole


def _notes(known: argparse.Namespace, measured: Sequence[Measured], command: str) -> list[str]:
    """What the figures mean, and of what they are."""
    environment = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    of_sets = (
        f"{one.rows.name}: {one.rows.describe()}, {len(one.excerpts):,} of them long enough to recite"
        for one in measured
    )
    short = [one.rows.name for one in measured if not one.excerpts]
    hint = f" No row of {', '.join(short)} has {known.k} + {SHORTEST} trained tokens: lower --k." if short else ""
    return [
        command,
        "; ".join(of_sets) + f".{hint}",
        f"Recited: greedily, word by word, from all that comes before a row's first trained tokens and {known.k} of "
        f"those; {SHORTEST} to {LONGEST} tokens of continuation.",
        f"{environment['date']}; {environment['processor']}; {versions}",
    ]


def _write(
    output: Path,
    history: History,
    rows: Sequence[Row],
    layers: Mapping[int, list[Movement]],
    recited: Sequence[Row],
    notes: Sequence[str],
) -> list[Path]:
    """Write the tables, the plots and the page."""
    write_csv(rows, output / "dynamics.csv")
    names = ["dynamics", "recited"]
    if of_layers := [{"step": step, **layer} for step, of_step in sorted(layers.items()) for layer in of_step]:
        write_csv(of_layers, output / "layers.csv")
        names.insert(1, "layers")
    write_csv(recited, output / "recited.csv", RECITED_COLUMNS)
    figures = _figures(rows, layers)
    for name, (image, _) in figures.items():
        with replacing(output / f"{name.lower()}.png") as temporary:
            temporary.write_bytes(image)
    index = output / "index.html"
    with replacing(index) as temporary:
        title = f"Dynamics of {history.directory}"
        temporary.write_text(page(title, notes, figures, rows, recited), encoding="utf-8")
    return [*(output / f"{name}.csv" for name in names), index]


def _figures(rows: Sequence[Row], layers: Mapping[int, list[Movement]]) -> dict[str, tuple[bytes, str]]:
    def of(prefix: str) -> dict[str, Any]:
        return {name: name.partition("/")[2] for name in rows[0] if name.startswith(prefix)}

    figures = {
        "Loss": (
            draw([("loss per token (nats)", lines(rows, of("loss/")))]),
            "Training rows below held-out ones: learned of them alone. Rising: forgotten.",
        ),
        "Memorization": (
            draw(
                [
                    ("share of rows recited exactly", lines(rows, of("recited/"))),
                    ("share of tokens before the first error", lines(rows, of("recited tokens/"))),
                ]
            ),
            "Recited more of training rows than of held-out ones: memorized. Of both alike: it follows from others.",
        ),
    }
    if not layers:
        return figures
    return figures | {
        "Movement": (
            draw(
                [
                    ("rms change of a column's entry", by_kind(layers, "rms")),
                    ("cosine to the last update", by_kind(layers, "cosine")),
                    ("effective rank", by_kind(layers, "effective_rank")),
                ]
            ),
            "Means over the layers of each kind.",
        ),
        "Shares": (
            draw([("share in the squared norm", shares(layers))]),
            "Of each kind of layer in what changed.",
        ),
    }
