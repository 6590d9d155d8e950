"""What a run leaves in its directory: read back, or made up."""

import csv
from pathlib import Path

import torch
from safetensors.torch import load_file

from paca_lightning import PaCAConfig, apply_paca, paca_layers, save_adapter
from tests.tiny import tiny_llama

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


def write_random_adapter(directory: Path, r: int, seed: int) -> Path:
    """Write an adapter of the tiny Llama, whose deltas are drawn at random. Returns its directory."""
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=r, seed=seed))
    with torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.normal_(generator=torch.Generator().manual_seed(seed))
    save_adapter(model, directory)
    return directory
