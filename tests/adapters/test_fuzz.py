"""Damaged adapters at random: loaded with the right values or refused with a PaCAError, and then no bit changes."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, load_adapter, save_adapter
from tests.adapters.test_trust import CONFIG, SETTINGS, TENSORS, snapshot

EXAMPLES = int(os.environ.get("PACA_FUZZ_EXAMPLES", "200"))


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(0.25 * (number + 1))
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    file=st.sampled_from([CONFIG, SETTINGS, TENSORS]), place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255)
)
def test_one_byte_of_any_file(tmp_path_factory: pytest.TempPathFactory, file: str, place: float, byte: int) -> None:
    directory: Path = tmp_path_factory.mktemp("adapter")
    expected = network()
    apply_paca(expected, PaCAConfig(r=2))
    expected[0].paca_delta.data.fill_(0.5)
    expected[0].write_columns()
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
