"""What a run leaves in its directory, read back."""

import csv
from pathlib import Path

from safetensors.torch import load_file

PNG = b"\x89PNG"
"""How the file of a plot begins."""


def logged(run: Path, name: str) -> list[float]:
    """The values of a metric in a run's ``metrics.csv``, in the order of logging."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def trained_layers(adapter: Path) -> list[str]:
    """Paths of the layers in an adapter directory, sorted; training has changed the delta of each."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    deltas = {name: tensor for name, tensor in tensors.items() if name.endswith(".paca_delta")}
    assert all(delta.any() for delta in deltas.values())
    return sorted(name.removeprefix("base_model.model.").removesuffix(".paca_delta") for name in deltas)
