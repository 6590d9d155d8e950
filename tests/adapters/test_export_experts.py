"""Exports of stacked experts: LoRA computes in PEFT what was trained, or is refused; merged ones gather once."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, export_lora, export_merged, paca_layers
from paca_lightning.adapters import export
from paca_lightning.core.dtensor import whole_tensor
from tests.moe import MODELS, tiny_moe, tokens
from tests.plain_training import move_trained

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "several ranks and scalings": {
        "target_modules": [*EXPERTS, "o_proj"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"o_proj": 2},
    },
    "experts alone": {"target_modules": EXPERTS},
    "one of two weights": {"target_modules": ["experts.down_proj", "o_proj"]},
    "with a router": {"target_modules": EXPERTS, "modules_to_save": ["layers.1.mlp.gate"]},
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(9)).logits


def trained(model: nn.Module, config: PaCAConfig) -> nn.Module:
    """A converted model with all that is trained moved."""
    apply_paca(model, config)
    move_trained(model, seed=0, scale=0.05)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_peft_computes_what_was_trained(kind: str, name: str, tmp_path: Path) -> None:
    settings = {"r": 4, "alpha": 8} | CONFIGS[name]
    if kind == "gpt_oss" and "modules_to_save" in settings:
        settings["modules_to_save"] = ["layers.1.mlp.router"]
    base = tiny_moe(kind)
    model = trained(copy.deepcopy(base), PaCAConfig(**settings))
    expected, effect = logits(model), (logits(base) - logits(model)).abs().max()
    export_lora(model, tmp_path)
    found = logits(PeftModel.from_pretrained(base, tmp_path))
    assert effect > 1e-3
    assert (found - expected).abs().max() < 1e-5 * effect
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_parameters"] == [
        layer.base_path(path) for path, layer in paca_layers(model) if "experts." in path
    ]


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_dense_layers_that_peft_takes_for_experts_are_refused(kind: str, tmp_path: Path) -> None:
    model = tiny_moe(kind)
    apply_paca(model, PaCAConfig(r=4))
    with pytest.raises(PaCAError, match=r"takes 'model\.layers\.0\.mlp\.gate_proj' \(6 such .* Use export_merged"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_merged_export_gathers_each_expert_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of the model, and gathering is what a sharded export waits for."""
    model = trained(tiny_moe("mixtral"), PaCAConfig(r=4, target_modules=EXPERTS))
    stacked = [layer.weight.shape for path, layer in paca_layers(model) if "experts." in path]
    gathers: Counter[torch.Size] = Counter()

    def counted(tensor: Tensor) -> Tensor:
        gathers[tensor.shape] += 1
        return whole_tensor(tensor)

    monkeypatch.setattr(export, "whole_tensor", counted)
    export_merged(model, tmp_path)
    assert {shape: count for shape, count in gathers.items() if len(shape) == 3} == Counter(stacked)
