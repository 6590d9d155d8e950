"""Work grows in proportion to a model: twice the layers, twice the calls. No clock is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from paca_lightning import PaCAConfig, apply_paca, load_adapter, merge, save_adapter, unload
from paca_lightning.core.reading import parse_json
from tests.reliability.call_count import CallCount

FEW, MANY = 40, 80


def calls(function: Callable[..., Any], *arguments: Any) -> int:
    """How many functions one function calls, in Python and in C."""
    counter = CallCount()
    counter.start()
    try:
        function(*arguments)
    finally:
        counter.stop()
    return counter.count


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)))


def heads(layers: int) -> nn.Module:
    """Blocks, and as many linear layers outside them."""
    blocks = nn.Sequential(*(block() for _ in range(layers)))
    outside = nn.ModuleDict({f"out_{number}": nn.Linear(4, 3 + number) for number in range(layers)})
    return nn.ModuleDict({"blocks": blocks, "outside": outside})


def shared(layers: int) -> nn.Module:
    """One layer in many places, among as many others."""
    one = nn.Linear(4, 4)
    return nn.Sequential(*(nn.Sequential(one, nn.Linear(4, 4)) for _ in range(layers)))


def work(make: Callable[[int], nn.Module], layers: int, directory: Path) -> dict[str, int]:
    """Calls of each operation on a model of so many layers."""
    model, config = make(layers), PaCAConfig(r=2)
    return {
        "convert": calls(apply_paca, model, config),
        "save": calls(save_adapter, model, directory),
        "unload": calls(unload, model),
        "load": calls(load_adapter, model, directory),
        "load into a converted model": calls(load_adapter, model, directory),
        "merge": calls(merge, model),
    }


def test_an_adapters_settings_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold 16 numbers of each layer."""
    model = heads(2)
    apply_paca(model, PaCAConfig(r=2))
    save_adapter(model, tmp_path)
    parsed: list[str] = []
    monkeypatch.setattr("paca_lightning.core.reading.parse_json", lambda text: parsed.append(text) or parse_json(text))
    load_adapter(model, tmp_path)
    assert len(parsed) == len(set(parsed)) == 2


@pytest.mark.parametrize("make", [heads, shared])
def test_twice_the_layers_need_twice_the_calls(make: Callable[[int], nn.Module], tmp_path: Path) -> None:
    work(make, 4, tmp_path / "imports")
    few, many = work(make, FEW, tmp_path / "few"), work(make, MANY, tmp_path / "many")
    # Work that grew with the square of the layers would grow fourfold.
    assert {name: many[name] / few[name] for name in few if many[name] > 2.05 * few[name]} == {}
