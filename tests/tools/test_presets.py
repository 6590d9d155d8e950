"""Shapes of well-known models."""

import pytest

from paca_lightning.tools.bench.workload import Workload
from paca_lightning.tools.presets import PRESETS, preset_config


def test_presets_have_the_published_sizes() -> None:
    def billions(name: str) -> float:
        return sum(parameter.numel() for parameter in Workload(preset=name).skeleton().parameters()) / 1e9

    assert billions("llama3-8b") == pytest.approx(8.03, abs=0.01)
    assert billions("llama3.1-70b") == pytest.approx(70.55, abs=0.01)
    assert preset_config("small").hidden_size == 1024
    assert Workload(preset="llama3-8b", layers=4).config.num_hidden_layers == 4
    assert set(PRESETS) == {"small", "small-moe", "llama3-8b", "llama3.1-70b"}
    small, experts = preset_config("small"), preset_config("small-moe")
    assert experts.num_experts_per_tok * experts.intermediate_size == small.intermediate_size  # work of a token
