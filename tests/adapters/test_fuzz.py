"""Damaged adapters at random: loaded with the right values or refused with a PaCAError, and then no bit changes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, load_adapter, paca_layers, save_adapter, unload
from paca_lightning.adapters.checkpoint import NOTE, note_adapter
from tests.adapters.test_adapter import seal
from tests.adapters.test_trust import CONFIG, SETTINGS, TENSORS, edit_header, forget_checksums, snapshot
from tests.reliability.examples import examples

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")]


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(0.25 * (number + 1))
    return model


def trained() -> nn.Sequential:
    model = network()
    apply_paca(model, PaCAConfig(r=2))
    model[0].paca_delta.data.fill_(0.5)
    model[0].write_columns()
    return model


@examples()
@given(
    file=st.sampled_from([CONFIG, SETTINGS, TENSORS]), place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255)
)
def test_one_byte_of_any_file(tmp_path_factory: pytest.TempPathFactory, file: str, place: float, byte: int) -> None:
    directory: Path = tmp_path_factory.mktemp("adapter")
    expected = trained()
    save_adapter(expected, directory)
    content = bytearray((directory / file).read_bytes())
    content[int(place * len(content))] = byte
    (directory / file).write_bytes(content)
    model = network()
    before = snapshot(model)
    try:
        load_adapter(model, directory)
    except PaCAError:
        assert snapshot(model) == before
    else:
        assert snapshot(model) == snapshot(expected)


# -- Fields of any type


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -(2**63), 2**64]) | st.floats() | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
) | st.sampled_from([nested(90), nested(300), "a" * 10**5, list(range(10**4)), "(a|aa)+$", "../../x", "\ud800"])
REMOVED = object()


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree of plain values with each of its keys."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def change_one(tree: Any, data: st.DataObject) -> None:
    """Replace, remove or rename one field, or add one with the value of another."""
    container, key = data.draw(st.sampled_from(list(places(tree))), label="place")
    value = data.draw(VALUES | st.just(REMOVED), label="value")
    if value is REMOVED:
        del container[key]
    elif isinstance(container, dict) and isinstance(value, str) and data.draw(st.booleans(), label="rename"):
        container[value] = container.pop(key) if data.draw(st.booleans(), label="move") else container[key]
    else:
        container[key] = value


def assert_loaded_or_refused(source: Path, data: st.DataObject) -> None:
    """A fresh and a converted model take the adapter and can give it back, or keep every bit."""
    for model in (network(), trained()):
        before = snapshot(model)
        try:
            load_adapter(model, source)
        except PaCAError:
            assert snapshot(model) == before
        else:
            assert all(bool(torch.isfinite(layer.weight).all()) for _, layer in paca_layers(model))
            assert snapshot(unload(model)) == snapshot(network())


@examples()
@given(data=st.data(), file=st.sampled_from([CONFIG, SETTINGS, TENSORS]), own=st.booleans())
def test_any_field_of_any_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, file: str, own: bool
) -> None:
    directory: Path = tmp_path_factory.mktemp("adapter")
    save_adapter(trained(), directory)
    forget_checksums(directory)  # so that the fields themselves are judged
    if file == TENSORS:
        edit_header(directory / TENSORS, lambda header: change_one(header, data))
    else:
        content = json.loads((directory / file).read_text())
        change_one(content, data)
        (directory / file).write_text(json.dumps(content))
    if not own and file != SETTINGS:
        (directory / SETTINGS).unlink()
    elif file == SETTINGS and own:
        reseal(directory)
    assert_loaded_or_refused(directory, data)


def reseal(directory: Path) -> None:
    """Give changed settings the checksums that fit them, as a forger would."""
    try:
        seal(directory)
    except (AttributeError, TypeError, ValueError):
        return  # the settings are no object any more


@examples()
@given(data=st.data())
def test_any_field_of_a_checkpoint(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    model = trained()
    content: dict[str, Any] = {"state_dict": dict(model.state_dict()), "global_step": 3, "loops": {"fit_loop": {}}}
    note_adapter(content, model)
    change_one(content if data.draw(st.booleans(), label="outside the note") else content[NOTE], data)
    torch.save(content, path)
    assert_loaded_or_refused(path, data)


# -- Trees of modules

SIZES = st.integers(0, 5)
LEAVES: list[Callable[[int, int], nn.Module]] = [
    nn.Linear,
    lambda rows, columns: nn.Linear(rows, columns, bias=False),
    lambda rows, columns: nn.Linear(rows, columns, dtype=torch.bfloat16),
    lambda rows, columns: nn.LayerNorm(rows),
    lambda rows, columns: nn.BatchNorm1d(rows),
    lambda rows, columns: nn.Embedding(rows + 1, columns),
    lambda rows, columns: nn.MultiheadAttention(rows + 1, 1),
    lambda rows, columns: nn.ReLU(),
]


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """Nested containers of layers of odd and zero sizes, some of them shared, some with a tied weight or frozen."""
    known: list[nn.Module] = []

    def leaf() -> nn.Module:
        if known and draw(st.integers(0, 5)) == 0:
            return draw(st.sampled_from(known))
        module = draw(st.sampled_from(LEAVES))(draw(SIZES), draw(SIZES))
        linears = [other for other in known if isinstance(other, nn.Linear)]
        if isinstance(module, nn.Linear) and linears and draw(st.integers(0, 4)) == 0:
            module.weight = draw(st.sampled_from(linears)).weight
        module.requires_grad_(draw(st.integers(0, 4)) > 0)
        known.append(module)
        return module

    def container(depth: int) -> nn.Module:
        kind = draw(st.sampled_from([nn.Sequential, lambda *parts: nn.ModuleList(parts)]))
        count = draw(st.integers(0, 4))
        return kind(*(container(depth - 1) if depth and draw(st.booleans()) else leaf() for _ in range(count)))

    return leaf() if draw(st.integers(0, 9)) == 0 else container(3)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@examples()
@given(
    model=trees(),
    r=st.integers(1, 4),
    quantize=st.sampled_from([None, None, "nf4"]),
    names=st.sampled_from(["all-linear", ["0"], ".*1"]),
    saved=st.sampled_from([[], [], ["1"]]),
)
def test_any_tree_of_modules(
    tmp_path_factory: pytest.TempPathFactory, model: nn.Module, r: int, quantize: str | None, names: Any, saved: Any
) -> None:
    before = snapshot(model)
    config = {"r": r, "quantize": quantize, "target_modules": names, "modules_to_save": saved}
    try:
        apply_paca(model, PaCAConfig(**config))
    except PaCAError:
        assert snapshot(model) == before
        return
    converted = snapshot(model)
    with torch.no_grad():
        for _, layer in paca_layers(model):
            layer.paca_delta.fill_(0.5)
            layer.write_columns()
    trained_state = snapshot(model)
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(model, directory)
    if quantize is None:
        assert snapshot(unload(model)) == before
        apply_paca(model, PaCAConfig(**config))
        assert snapshot(model) == converted
    load_adapter(model, directory)
    assert snapshot(model) == trained_state
