"""CPU time of converting and loading models of many small layers: `python -m tests.reliability.large_models`."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paca_lightning import PaCAConfig, apply_paca, load_adapter, save_adapter
from tests.reliability.test_growth import calls


def block() -> nn.Module:
    """Seven linear layers of 8 x 8, as a decoder has, so that the weights cost nothing."""
    attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k", "v", "o")})
    mlp = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate", "up", "down")})
    return nn.ModuleDict({"attention": attention, "mlp": mlp, "norm": nn.LayerNorm(8)})


def model(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(layers // 7)), "head": nn.Linear(8, 5)})


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """CPU seconds of this process, which other processes do not change."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def measure(layers: int, directory: Path, *, count: bool) -> dict[str, float]:
    config = PaCAConfig(r=2)
    first, second = model(layers), model(layers)
    found = {"convert": seconds(apply_paca, first, config), "save": seconds(save_adapter, first, directory)}
    found["load"] = seconds(load_adapter, second, directory)
    found["load, converted"] = seconds(load_adapter, second, directory)
    if count:
        found["calls a layer, load"] = calls(load_adapter, model(layers), directory) / layers
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="*", type=int, default=[500, 1000, 2000, 4000])
    parser.add_argument("--calls", action="store_true", help="count calls, too, which takes ten times as long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure(50, Path(scratch) / "imports", count=False)
        for layers in options.layers:
            found = measure(layers, Path(scratch) / str(layers), count=options.calls)
            print(layers, *(f"{name}: {value:.2f}" for name, value in found.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
