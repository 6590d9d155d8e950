"""Stacked experts, sharded by expert: training, checkpoints, and files that hold each expert by itself."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from paca_lightning import PaCAConfig, PaCAError, apply_paca, export_merged
from paca_lightning.activation_checkpointing.blocks import find_blocks
from paca_lightning.strategies.fsdp2.materializing import materialize
from paca_lightning.strategies.fsdp2.merged_rows import ModelReader
from paca_lightning.strategies.fsdp2.sharding import ShardingOptions, shard
from tests.distributed_launch import launch
from tests.distributed_training import Run, assert_equal_runs, train, train_all
from tests.moe import MODELS, tiny_moe

CONFIG = PaCAConfig(r=4, alpha=8, selection="weight_norm")
RUNS = {
    "mixtral": Run(steps=4, strategy={}, module={"experts": "mixtral"}),
    "gpt_oss": Run(steps=4, strategy={}, module={"experts": "gpt_oss"}),
    "three experts": Run(steps=4, strategy={}, module={"experts": "mixtral", "num_local_experts": 3}),
    "kept gathered": Run(steps=4, strategy={"reshard_after_forward": False}, module={"experts": "qwen3_moe"}),
    "activation checkpointing": Run(
        steps=4, strategy={"activation_checkpointing": True}, module={"experts": "deepseek_v3"}
    ),
}


def meta_model(directory: Path) -> nn.Module:
    """A converted model on meta, whose weights will be read from the directory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).train()
    model.checkpoint_directory = directory
    apply_paca(model, CONFIG)
    return model


def loaded(directory: Path) -> dict[str, torch.Tensor]:
    """The state of the same model, loaded by transformers and then converted."""
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    apply_paca(model, CONFIG)
    return model.state_dict()


def on_two_ranks(runs: dict[str, Run], half: Run, directories: dict[str, Path], exported: Path) -> dict[str, Any]:
    """Everything that needs two ranks, in one launch."""
    streamed = {}
    for kind, directory in directories.items():
        model = meta_model(directory)
        shard(model, init_device_mesh("cpu", (2,)), find_blocks(model), ShardingOptions())
        materialize(model, torch.device("cpu"))
        state = model.state_dict()
        streamed[kind] = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    export_merged(model, exported)
    train(half)
    resumed = dataclasses.replace(half, steps=8, save=None, resume=half.save)
    whole = dataclasses.replace(half, steps=8, save=None)
    return {"runs": train_all(runs), "streamed": streamed, "resumed": train(resumed), "whole": train(whole)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as transformers writes them: but for GPT-OSS, with three tensors an expert."""
    base = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        tiny_moe(kind).save_pretrained(base / kind, max_shard_size="30KB")
    return {kind: base / kind for kind in MODELS}


@pytest.fixture(scope="module")
def two_ranks(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("runs")
    half = Run(steps=5, strategy={}, module={"experts": "mixtral", "by_step": True}, save=base / "half.ckpt")
    sharded = {kind: directories[kind] for kind in ("gpt_oss", "deepseek_v2", "mixtral")}
    result: dict[str, Any] = launch(on_two_ranks, 2, RUNS, half, sharded, base / "merged")[0]
    return result | {"merged": base / "merged"}


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_experts_on_two_ranks_train_as_on_one(two_ranks: dict[str, Any], name: str) -> None:
    assert_equal_runs(two_ranks["runs"][name], train(dataclasses.replace(RUNS[name], strategy=None)))


@pytest.mark.distributed
def test_experts_resume_from_a_sharded_checkpoint(two_ranks: dict[str, Any]) -> None:
    resumed, whole = two_ranks["resumed"], two_ranks["whole"]
    assert resumed["losses"] == whole["losses"][5:]
    assert all(torch.equal(resumed["deltas"][path], delta) for path, delta in whole["deltas"].items())


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v2", "mixtral"])
def test_each_rank_fills_its_experts(directories: dict[str, Path], two_ranks: dict[str, Any], kind: str) -> None:
    expected = loaded(directories[kind])
    assert expected.keys() == two_ranks["streamed"][kind].keys()
    for name, tensor in expected.items():
        assert torch.equal(two_ranks["streamed"][kind][name], tensor), name


@pytest.mark.distributed
def test_sharded_experts_are_exported_as_transformers_reads_them(
    directories: dict[str, Path], two_ranks: dict[str, Any]
) -> None:
    read = AutoModelForCausalLM.from_pretrained(two_ranks["merged"], dtype=torch.float32).state_dict()
    for name, tensor in tiny_moe("mixtral").state_dict().items():  # of which the deltas are zero
        assert torch.equal(read[name], tensor.bfloat16().float()), name


@pytest.mark.parametrize("kind", MODELS)
def test_files_with_each_expert_fill_the_stacked_parameter(directories: dict[str, Path], kind: str) -> None:
    names = {name for file in directories[kind].glob("*.safetensors") for name in load_file(file)}
    apart = [name for name in names if ".experts.3." in name]
    assert len(apart) == {"gpt_oss": 0, "deepseek_v2": 3, "deepseek_v3": 3}.get(kind, 6)
    model, expected = meta_model(directories[kind]), loaded(directories[kind])
    materialize(model, torch.device("cpu"))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)] == []


def test_a_reader_reads_the_experts_that_are_asked_for(directories: dict[str, Path]) -> None:
    model = tiny_moe("mixtral")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    reader = ModelReader(directories["mixtral"], model, dict(model.named_parameters()))
    assert set(reader.names) == set(dict(model.named_parameters()))
    assert reader.shape(name) == (4, 96, 32)
    assert torch.equal(reader.read(name, slice(1, 3)), model.get_parameter(name)[1:3])
    assert reader.bytes_read == reader.size(name, slice(1, 3)) == 2 * 96 * 32 * 4
    assert reader.read(name, slice(4, 4)).shape == (0, 96, 32)  # of more ranks than experts


@pytest.mark.parametrize(("kept", "message"), [(3, "some experts are missing"), (0, "has no tensor 'model")])
def test_a_checkpoint_without_some_experts_is_refused(tmp_path: Path, kept: int, message: str) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ends = "experts.3.w1.weight" if kept else ".weight"
    lost = [name for name in tensors if "layers.1" in name and ".experts." in name and name.endswith(ends)]
    save_file({name: t for name, t in tensors.items() if name not in lost}, tmp_path / "model.safetensors")
    with pytest.raises(PaCAError, match=f"(?i){message}"):
        materialize(meta_model(tmp_path), torch.device("cpu"))
