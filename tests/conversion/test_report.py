"""The report names all that is left frozen, by kind, with its share of the parameters."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from paca_lightning import ConversionReport, PaCAConfig, apply_paca
from tests.tiny import tiny_llama


def shares(report: ConversionReport) -> dict[str, int]:
    return {group.kind: group.parameters for group in report.frozen}


def test_embeddings_norms_and_biases_are_named_with_their_share() -> None:
    report = apply_paca(tiny_llama(attention_bias=True), PaCAConfig(r=4))
    biases = 2 * (64 + 32 + 32 + 64)
    assert shares(report) == {"embeddings": 384 * 64, "norms": 5 * 64, "biases": biases}
    lines = " ".join(str(report).split()).split("Frozen: ")[1:]
    percent = 100 * 384 * 64 / report.total_parameters
    assert lines[0].startswith(f"embeddings: model.embed_tokens.weight, 24,576 parameters ({percent:.1f}%).")
    assert lines[1].startswith("biases: model.layers.0.self_attn.q_proj.bias and 7 more, 384 parameters (0.3%).")


def test_fused_experts_and_routers_are_named() -> None:
    config = MixtralConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    left = PaCAConfig(r=4, exclude_modules=["experts.gate_up_proj", "experts.down_proj"])
    report = apply_paca(MixtralForCausalLM(config), left)
    experts = 2 * 4 * 3 * 64 * 96
    kind = "3-D parameters that no linear layer holds (such as fused experts)"
    assert shares(report)[kind] == experts
    assert shares(report)["matrices that no linear layer holds (such as routers of experts)"] == 2 * 4 * 64
    largest = report.frozen[0]
    assert (largest.kind, largest.tensors) == (kind, 4)
    assert "experts" in largest.example
    assert f"({experts / report.total_parameters:.1%})" in str(report)


def test_convolutions_and_other_parameters_are_named_and_all_add_up() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

    model = Network()
    total = sum(parameter.numel() for parameter in model.parameters())
    report = apply_paca(model, PaCAConfig(r=2))
    assert shares(report) == {"convolutions": 108, "biases": 8, "norms": 8, "other parameters": 4}
    assert sum(shares(report).values()) + 4 * 4 == total


def test_what_is_trained_is_not_named_as_frozen() -> None:
    report = apply_paca(tiny_llama(), PaCAConfig(r=4, modules_to_save=["norm", "embed_tokens"]))
    assert shares(report) == {"norms": 4 * 64}


@pytest.mark.parametrize(
    ("config", "columns", "steps"),
    [
        (PaCAConfig(r=4), None, False),
        (PaCAConfig(r=4, selection="weight_norm"), None, False),
        (
            PaCAConfig(r=4, selection="gradient_norm", column_steps="equal"),
            "gradient_norm chooses those of 14 layers",
            False,
        ),
        (
            PaCAConfig(r=4, quantize="nf4", selection="output_error"),
            "output_error chooses those of 14 layers by data, before they are quantized.",
            True,
        ),
        (PaCAConfig(r=4, column_steps="input_rms"), None, True),
    ],
)
def test_what_data_decides_is_told(config: PaCAConfig, columns: str | None, steps: bool) -> None:
    ids = torch.arange(12)[None]
    report = apply_paca(tiny_llama(), config, calibration=[{"input_ids": ids, "labels": ids}])
    printed = " ".join(str(report).split())
    assert ("Columns: " in printed) == (columns is not None)
    assert columns is None or f"Columns: {columns}" in printed
    assert ("Steps: each column's fits its input, by data" in printed) is steps
