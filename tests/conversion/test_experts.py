"""Stacked experts through their life: conversion, training, files, and the way back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    apply_paca,
    attach,
    disable_paca,
    export_merged,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
    unload,
)
from paca_lightning.adapters.state_dict import keep_trained_state
from paca_lightning.layers.experts import PaCAExperts
from tests.moe import MODELS, tiny_moe, tokens

ALL = PaCAConfig(r=4, alpha=8)
EXPERTS = PaCAConfig(r=4, target_modules=["experts.gate_up_proj", "experts.down_proj"])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(9)).logits


def trained(model: Any, steps: int = 3, first: int = 0, optimizer: Any = None) -> torch.optim.Optimizer:
    """Train a converted model, on batches that are numbered."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    handle = attach(optimizer, model)
    for step in range(first, first + steps):
        ids = tokens(step)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return optimizer


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    model = tiny_moe(kind)
    base = list(model.parameters())
    base_state, base_logits = copy.deepcopy(model.state_dict()), logits(model)
    report = apply_paca(model, ALL)
    stacked = [record for record in report.layers if "experts." in record.path and record.experts == 4]
    assert len(stacked) == (2 if "deepseek" in kind else 4)
    assert sum(record.trainable for record in report.layers) == report.trainable_parameters
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total_parameters == report.trainable_parameters + sum(map(torch.numel, base))
    assert f"4 x {stacked[0].in_features} -> {stacked[0].out_features}" in str(report)
    assert not any("experts.gate_up_proj:" in line for line in str(report).splitlines())

    trained(model)
    after = logits(model)
    assert not torch.equal(after, base_logits)
    with disable_paca(model):
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), after)

    save_adapter(model, tmp_path / "adapter")
    loaded = tiny_moe(kind)
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), after)
    assert same(loaded.state_dict(), model.state_dict())

    merged = merge(copy.deepcopy(model))
    assert merged.state_dict().keys() == base_state.keys()
    assert torch.equal(logits(merged), after)
    unload(model)
    assert same(model.state_dict(), base_state)
    assert torch.equal(logits(model), base_logits)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("paca" in name for name in vars(model.model.layers[1].mlp.experts))


def test_a_step_writes_the_columns_and_nothing_else() -> None:
    model = tiny_moe("gpt_oss")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_paca(model, EXPERTS)
    trained(model, 1)
    for path, layer in paca_layers(model):
        weight, name = layer.base, layer.base_path(path)
        changed = (weight != before[name]).any(0).any(1)  # (experts, in_features, out_features)
        assert set(changed.nonzero().flatten().tolist()) == set(layer.paca_indices.tolist())
        expected = layer.paca_base_columns + layer.scaling * layer.paca_delta
        assert torch.equal(weight.mT[..., layer.paca_indices], expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before and "experts" not in n)


def test_training_goes_on_bitwise_from_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_moe("qwen3_moe")
    apply_paca(model, EXPERTS)
    keep_trained_state(model)
    optimizer = trained(model, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    trained(model, 3, first=2, optimizer=optimizer)

    resumed = tiny_moe("qwen3_moe")
    apply_paca(resumed, EXPERTS)
    keep_trained_state(resumed)
    state = torch.load(tmp_path / "state.pt")
    assert {key.rpartition(".")[2] for key in state["model"]} >= {"paca_delta", "paca_indices"}
    assert not any(key.endswith(("_proj", "norm.weight", "paca_base_columns")) for key in state["model"])
    resumed.load_state_dict(state["model"], strict=True)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-2)
    optimizer.load_state_dict(state["optimizer"])
    trained(resumed, 3, first=2, optimizer=optimizer)
    assert same(resumed.state_dict(), model.state_dict())
    assert torch.equal(logits(resumed), logits(model))


def test_a_base_checkpoint_is_loaded_below_the_columns() -> None:
    model, other = tiny_moe("mixtral"), tiny_moe("mixtral", seed=1)
    apply_paca(model, EXPERTS)
    trained(model, 1)
    deltas = {path: layer.paca_delta.detach().clone() for path, layer in paca_layers(model)}
    model.load_state_dict(other.state_dict(), strict=False)
    for path, layer in paca_layers(model):
        base = other.get_parameter(layer.base_path(path))[..., layer.paca_indices]
        assert torch.equal(layer.paca_base_columns, base)
        assert torch.equal(layer.base[..., layer.paca_indices], base + deltas[path])


def test_casts_and_copies_keep_the_deltas() -> None:
    model = tiny_moe("mixtral").bfloat16()
    apply_paca(model, EXPERTS)
    trained(model, 1)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    trained(twin, 1)
    assert not torch.equal(logits(twin), logits(model))
    layers = dict(paca_layers(model))
    deltas = {path: layer.paca_delta.detach().clone() for path, layer in layers.items()}
    model.float()
    for path, layer in layers.items():  # a wider weight holds more of the delta
        expected = layer.paca_base_columns.float() + deltas[path]
        assert torch.equal(layer.base[..., layer.paca_indices], expected)
    trained(model, 1)
    assert all(layer.paca_delta.dtype == torch.float32 for layer in layers.values())


def test_the_merged_export_is_what_transformers_reads(tmp_path: Path) -> None:
    for kind in ("mixtral", "gpt_oss", "deepseek_v3"):
        model = tiny_moe(kind)
        for parameter in model.parameters():  # no buffers, which from_pretrained leaves wide
            parameter.data = parameter.data.bfloat16()
        apply_paca(model, EXPERTS)
        trained(model, 2)
        export_merged(model, tmp_path / kind)
        merge(model)
        read = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.bfloat16)
        assert same(read.state_dict(), model.state_dict())
        assert torch.equal(logits(read), logits(model))


def test_columns_of_the_largest_norm_are_those_over_all_experts() -> None:
    for kind in ("mixtral", "gpt_oss"):
        model = tiny_moe(kind)
        weight = model.model.layers[0].mlp.experts.down_proj.detach()
        norms = (weight.mT if kind == "gpt_oss" else weight).norm(dim=(0, 1))
        apply_paca(model, PaCAConfig(r=4, target_modules=["experts.down_proj"], selection="weight_norm"))
        layer = next(layer for _, layer in paca_layers(model))
        assert layer.paca_indices.tolist() == norms.topk(4).indices.sort().values.tolist()


def test_adapters_without_the_experts_leave_them_alone(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    apply_paca(model, PaCAConfig(r=4, exclude_modules=["experts.gate_up_proj", "experts.down_proj"]))
    trained(model, 1)
    save_adapter(model, tmp_path)
    for name in ("adapter_config.json", "paca_lightning.json"):
        text = (tmp_path / name).read_text()
        assert "experts.down_proj" in text
    (tmp_path / "paca_lightning.json").unlink()  # as other programs write it, and for all linear layers
    config = (tmp_path / "adapter_config.json").read_text()
    start, end = config.index('"exclude_modules"'), config.index('"modules_to_save"')
    (tmp_path / "adapter_config.json").write_text(config[:start] + config[end:])
    loaded = tiny_moe("mixtral")
    load_adapter(loaded, tmp_path)
    assert len(list(paca_layers(loaded))) == 8
    assert torch.equal(logits(loaded), logits(model))


def test_experts_of_a_model_that_was_frozen_as_a_whole_are_converted() -> None:
    model = tiny_moe("mixtral").requires_grad_(False)
    assert len(apply_paca(model, ALL).layers) == len(apply_paca(tiny_moe("mixtral"), ALL).layers) == 12
    by_hand = tiny_moe("mixtral")
    by_hand.model.layers[0].mlp.experts.requires_grad_(False)
    report = apply_paca(by_hand, ALL)  # beside layers that are trainable, what is frozen stays so
    assert len(report.layers) == 10
    assert report.skipped["model.layers.0.mlp.experts.down_proj"].startswith("frozen before the conversion")


def test_an_adapter_for_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    apply_paca(model, EXPERTS)
    save_adapter(model, tmp_path)
    other = tiny_moe("mixtral", num_local_experts=6)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(PaCAError, match=r"experts\.gate_up_proj' has shape \(4, 96, 4\), the model needs \(6, 96, 4\)"):
        load_adapter(other, tmp_path)
    assert same(other.state_dict(), before)


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"quantize": "nf4"}, "stacked experts cannot be quantized to NF4"),
    ({"selection": "activation_norm"}, "selection='activation_norm' looks at linear layers only"),
    ({"column_steps": "input_rms"}, "column_steps='input_rms' looks at linear layers only"),
]


@pytest.mark.parametrize(("settings", "reason"), SETTINGS)
def test_settings_that_experts_cannot_follow(settings: dict[str, Any], reason: str) -> None:
    calibration = [{"input_ids": tokens()}]
    with pytest.raises(PaCAError, match=f"names '.*experts.gate_up_proj', which cannot be converted: {reason}"):
        apply_paca(
            tiny_moe("mixtral"),
            PaCAConfig(r=4, target_modules=["q_proj", "experts.gate_up_proj"], **settings),
            calibration=calibration,
        )
    model = tiny_moe("mixtral")
    report = apply_paca(model, PaCAConfig(r=4, **settings), calibration=calibration)  # all-linear tells, and goes on
    assert [path for path, why in report.skipped.items() if why.startswith(reason)] == [
        f"model.layers.{block}.mlp.experts.{name}" for block in range(2) for name in ("gate_up_proj", "down_proj")
    ]
    assert len(list(paca_layers(model))) == 8


def test_experts_in_kernels_of_their_own_are_told() -> None:
    model = tiny_moe("mixtral")
    model.config._experts_implementation = "deepgemm"  # which needs a GPU to be set
    report = apply_paca(model, PaCAConfig(r=4))
    assert "'deepgemm' reads it in kernels of its own" in report.skipped["model.layers.0.mlp.experts.down_proj"]


def test_experts_trained_whole_or_excluded_have_no_columns() -> None:
    model = tiny_moe("mixtral")
    config = PaCAConfig(
        r=4, modules_to_save=["layers.0.mlp.experts"], exclude_modules=["layers.1.mlp.experts.down_proj"]
    )
    report = apply_paca(model, config)
    assert [path for path, layer in paca_layers(model) if isinstance(layer, PaCAExperts)] == [
        "model.layers.1.mlp.experts.paca_columns_of_gate_up_proj"
    ]
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "trained whole (modules_to_save)"
    trained(model, 1)


@pytest.mark.parametrize(("kind", "router"), [("mixtral", "mlp.gate"), ("gpt_oss", "mlp.router")])
def test_routers_are_trained_if_asked_for(kind: str, router: str, tmp_path: Path) -> None:
    model = tiny_moe(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if router in name}
    report = apply_paca(model, PaCAConfig(r=4, modules_to_save=[router]))
    assert [path for path in report.saved if path.endswith(router)] == [f"model.layers.{n}.{router}" for n in range(2)]
    trained(model)
    routers = {name: p for name, p in model.named_parameters() if name in before}
    assert len(routers) == len(before) >= 2
    assert not any(torch.equal(p, before[name]) for name, p in routers.items())
    save_adapter(model, tmp_path)
    loaded = tiny_moe(kind)
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    unload(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_conversion_that_fails_leaves_the_experts_as_they_were() -> None:
    model = tiny_moe("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PaCAError, match="calibration batches"):
        apply_paca(model, PaCAConfig(r=4, selection="activation_norm"), calibration=[])
    apply_paca(model, EXPERTS)
    with pytest.raises(PaCAError, match="another configuration"):
        apply_paca(model, ALL)
    assert apply_paca(model, EXPERTS).trainable_parameters == 2 * 4 * (96 + 32) * 4
    unload(model)
    assert same(model.state_dict(), before)
    assert not any(isinstance(module, PaCAExperts) for module in model.modules())
    assert isinstance(model, nn.Module)
