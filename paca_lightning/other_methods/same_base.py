"""The base model of an adapter that another method trained: some values of each frozen weight, compared on loading."""

from pathlib import Path
from typing import Any

from torch import nn

from paca_lightning.adapters.files import read_json, write_json
from paca_lightning.adapters.fingerprint import differing_layer, sample_columns
from paca_lightning.core.errors import PaCAError

FILE = "base_samples.json"
"""Of an adapter directory, beside what the method's own library reads."""

BaseSamples = dict[str, list[float]]
"""At most 16 values of each weight, by its name in the base model."""


def weight_samples(model: nn.Module) -> BaseSamples:
    """Some values of each matrix of a model that is not adapted yet; weights that are packed as integers have none."""
    named = model.named_parameters()
    return {name: sample_columns(p.detach()) for name, p in named if p.ndim >= 2 and p.is_floating_point()}


def of_frozen(samples: BaseSamples, adapted: nn.Module) -> BaseSamples:
    """Of a model's samples, those of weights that stayed frozen when it was adapted.

    A new head, which is drawn at random and trained whole, does not tell base models apart.

    Args:
        samples: Of the model before.
        adapted: The same model with a method's layers in it.
    """
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    whole = {name.partition(".modules_to_save.")[0] + "." for name in trained if ".modules_to_save." in name}
    return {name: v for name, v in samples.items() if name not in trained and not name.startswith(tuple(whole))}


def write_samples(samples: BaseSamples, directory: Path) -> None:
    """Write them beside an adapter."""
    write_json(directory / FILE, samples)


def check_adapter_base(here: BaseSamples, directory: Path) -> None:
    """Compare this run's base model with that of an adapter, if its directory tells.

    Raises:
        PaCAError: If they differ by more than rounding, or the file is damaged.
    """
    if (file := directory / FILE).is_file():
        check_same_base(here, read_json(file), str(file))


def check_same_base(here: BaseSamples, saved: dict[str, Any], where: str) -> None:
    """Compare this run's base model with samples of another.

    Weights that only one of them has as numbers, because the other is quantized, are not compared.

    Args:
        here: Samples of this run's base model.
        saved: Those that were saved.
        where: What holds them, to begin the message.

    Raises:
        PaCAError: If they differ by more than rounding, or are no samples.
    """
    if not all(isinstance(values, list) and all(type(v) is float for v in values) for values in saved.values()):
        raise PaCAError(f"{where} is damaged: it must hold lists of numbers.")
    path = differing_layer({name: values for name, values in saved.items() if name in here}, here)
    if path is not None:
        raise PaCAError(
            f"{where}: the base model was another one: its weights differ from those here, most in {path!r}. Give the "
            "model that the training began with."
        )
