"""A safetensors checkpoint fills a model on the meta device. Each rank reads and keeps its rows only."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from paca_lightning import PaCAConfig, PaCAError, apply_paca, disable_paca, load_adapter, paca_layers, save_adapter
from paca_lightning.activation_checkpointing.blocks import find_blocks
from paca_lightning.core.dtensor import local
from paca_lightning.layers.columns import largest_indices
from paca_lightning.layers.nf4 import quantize_rows, squared_errors
from paca_lightning.strategies.fsdp2 import materializing
from paca_lightning.strategies.fsdp2.materializing import materialize
from paca_lightning.strategies.fsdp2.rows import RowReader
from paca_lightning.strategies.fsdp2.sharding import ShardingOptions, shard
from paca_lightning.strategies.fsdp2.streaming import stream
from tests.distributed_launch import launch
from tests.distributed_training import Run, TinyChat, make_trainer, train, train_all
from tests.peak_memory import peak_bytes
from tests.tiny import tiny_llama

DENSE, NF4 = PaCAConfig(r=4), PaCAConfig(r=4, quantize="nf4")
NORMS = PaCAConfig(r=4, train_norms=True, norms_lr=0.25)
IDS = torch.arange(32).view(2, 16)


def meta_model(directory: Path) -> nn.Module:
    """A model on meta whose weights will be read from the directory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).train()
    model.checkpoint_directory = directory
    return model


def checkpoint(path: Path, *, shard_size: str = "100KB", **overrides: Any) -> Path:
    """Write a tiny Llama with odd sizes, in several files."""
    settings = {"intermediate_size": 97, "vocab_size": 383} | overrides
    tiny_llama(**settings).save_pretrained(path, max_shard_size=shard_size)
    return path


def streamed(directory: Path, config: PaCAConfig | None) -> nn.Module:
    """A model filled from the directory, sharded if there are several processes."""
    model = meta_model(directory)
    if config:
        apply_paca(model, config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        shard(model, init_device_mesh("cpu", (world_size,)), find_blocks(model), ShardingOptions())
    materialize(model, torch.device("cpu"))
    return model


@torch.no_grad()
def whole_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers of a model, gathered."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def loaded(directory: Path, config: PaCAConfig | None) -> nn.Module:
    """The same model without streaming."""
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    if config:
        apply_paca(model, config)
    return model


def on_two_ranks(directories: dict[str, Path]) -> dict[str, Any]:
    result: dict[str, Any] = {
        name: whole_tensors(streamed(directory, config))
        for name, directory in directories.items()
        for config in [{"dense": DENSE, "tied": DENSE, "NF4": NF4}[name]]
    }
    result["loss"] = streamed(directories["dense"], DENSE)(input_ids=IDS, labels=IDS).loss.item()
    result["columns"] = {
        selection: chosen(directories["dense"], selection) for selection in ("weight_norm", "quant_error")
    }
    return result


def chosen(directory: Path, selection: str) -> dict[str, torch.Tensor]:
    """Columns that are chosen while the weights are read."""
    model = meta_model(directory)
    apply_paca(model, dataclasses.replace(NF4, selection=selection))
    shard(model, init_device_mesh("cpu", (2,)), find_blocks(model), ShardingOptions())
    materialize(model, torch.device("cpu"))
    return {path: layer.paca_indices for path, layer in paca_layers(model)}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    odd = checkpoint(base / "odd")
    return {"dense": odd, "NF4": odd, "tied": checkpoint(base / "tied", tie_word_embeddings=True, shard_size="1GB")}


@pytest.fixture(scope="module")
def two_ranks(directories: dict[str, Path]) -> list[dict[str, Any]]:
    return launch(on_two_ranks, 2, directories)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "config"), [("dense", DENSE), ("tied", DENSE), ("NF4", NF4)])
def test_streamed_rows_are_those_of_the_whole_model(
    directories: dict[str, Path], two_ranks: list[dict[str, Any]], name: str, config: PaCAConfig
) -> None:
    expected = whole_tensors(loaded(directories[name], config))
    assert expected.keys() == two_ranks[0][name].keys()
    for tensor, value in expected.items():  # rotary frequencies, which no file holds, among them
        assert torch.equal(two_ranks[0][name][tensor], value), tensor


@pytest.mark.distributed
def test_a_streamed_model_computes(directories: dict[str, Path], two_ranks: list[dict[str, Any]]) -> None:
    expected = loaded(directories["dense"], DENSE)(input_ids=IDS, labels=IDS).loss.item()
    assert two_ranks[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.distributed
def test_a_run_streams_a_model_that_was_built_on_meta(directories: dict[str, Path]) -> None:
    runs = {
        "dense": Run(strategy={}, steps=3, module={"directory": directories["dense"]}),
        "NF4": Run(strategy={}, steps=3, module={"directory": directories["NF4"]}, config=NF4),
        "bf16-true, offloaded": Run(
            strategy={"cpu_offload": True},
            steps=3,
            module={"directory": directories["tied"]},
            trainer={"precision": "bf16-true"},
        ),
    }
    for name, result in launch(train_all, 2, runs)[0].items():
        one = train(dataclasses.replace(runs[name], strategy=None, ranks_of_one=2))
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-6)
        for path, delta in one["deltas"].items():
            torch.testing.assert_close(result["deltas"][path], delta, rtol=0, atol=1e-5)


def norms_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in whole_tensors(module).items() if "norm" in name}


def train_norms_of_a_streamed_model(directory: Path, adapter: Path) -> dict[str, Any]:
    """Losses, and the norms as they were trained and as they are without the adapter; the adapter is saved."""
    module = TinyChat(directory=directory)
    make_trainer(Run(strategy={}, steps=3, config=NORMS)).fit(module)
    assert module.model is not None
    save_adapter(module.model, adapter)
    trained = norms_of(module.model)
    with disable_paca(module):
        return {"losses": module.losses, "trained": trained, "base": norms_of(module.model)}


@pytest.mark.distributed
def test_norms_of_a_streamed_model_are_trained_and_go_back(directories: dict[str, Path], tmp_path: Path) -> None:
    result = launch(train_norms_of_a_streamed_model, 2, directories["dense"], tmp_path / "adapter")[0]
    run = Run(steps=3, module={"directory": directories["dense"]}, config=NORMS, ranks_of_one=2)
    assert result["losses"] == pytest.approx(train(run)["losses"], rel=1e-6)
    model = loaded(directories["dense"], None)
    base = norms_of(model)
    load_adapter(model, tmp_path / "adapter")
    for name, tensor in norms_of(model).items():
        assert torch.equal(result["base"][name], base[name])
        assert torch.equal(result["trained"][name], tensor)
        assert not torch.equal(tensor, base[name])


@pytest.mark.distributed
@pytest.mark.parametrize("selection", ["weight_norm", "quant_error"])
def test_scores_are_summed_over_ranks(
    directories: dict[str, Path], two_ranks: list[dict[str, Any]], selection: str
) -> None:
    model = loaded(directories["dense"], None)
    for path, columns in two_ranks[0]["columns"][selection].items():
        weight = model.get_submodule(path).weight.detach()
        scores = squared_errors(weight) if selection == "quant_error" else weight.square().sum(0)
        assert torch.equal(columns, largest_indices(scores, 4)), path
        assert torch.equal(columns, two_ranks[1]["columns"][selection][path])


def measured(directory: Path, config: PaCAConfig) -> dict[str, Any]:
    """Bytes that this rank reads and keeps when it loads a model, and the peak of its memory."""
    model = meta_model(directory)
    apply_paca(model, config)
    shard(model, init_device_mesh("cpu", (2,)), find_blocks(model), ShardingOptions())
    quantize_rows(torch.ones(2, 64))  # imports the kernels
    readers: list[RowReader] = []
    materializing.stream = lambda *arguments: readers.append(stream(*arguments))  # type: ignore[assignment]
    mapped = {file.stat().st_size for file in directory.glob("*.safetensors")}
    peak = peak_bytes(lambda: materialize(model, torch.device("cpu")), mapped)
    return {
        "read": readers[0].bytes_read,
        "kept": sum(local(parameter).untyped_storage().nbytes() for parameter in model.parameters()),
        "peak": peak,
    }


SPARING = pytest.mark.skipif(
    Version(bitsandbytes.__version__) < Version("0.50"),
    reason="bitsandbytes before 0.50 compares each weight with all 16 levels at once on a CPU",
)


@pytest.mark.distributed
@pytest.mark.parametrize("config", [DENSE, pytest.param(NF4, marks=SPARING)])
def test_a_rank_reads_and_needs_little_more_than_its_share(tmp_path: Path, config: PaCAConfig) -> None:
    directory = checkpoint(tmp_path, hidden_size=256, intermediate_size=700, vocab_size=4000, shard_size="3MB")
    files = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    weights = [tensor for file in directory.glob("*.safetensors") for tensor in load_file(file).values()]
    largest = sorted(tensor.nbytes // 2 for tensor in weights)[-2:]
    for rank in launch(measured, 2, directory, config):
        assert rank["read"] <= 1.1 * files / 2
        assert rank["peak"] <= rank["kept"] + sum(largest)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a checkpoint of one file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(K_PROJ), rf"has no tensor '{K_PROJ}' \(1 are missing\)"),
        (
            lambda tensors: tensors.update({K_PROJ: torch.zeros(32, 60)}),
            rf"'{K_PROJ}' has shape \(32, 60\) in '.*model.safetensors' and \(32, 64\) in the model",
        ),
        (
            lambda tensors: tensors.update({"model.layers.2.mlp.weight": torch.zeros(2, 2)}),
            "has a tensor 'model.layers.2.mlp.weight' that the model lacks",
        ),
        (lambda tensors: tensors[K_PROJ].fill_(float("nan")), f"model.safetensors: The weight of '{K_PROJ}' holds NaN"),
    ],
)
def test_another_models_checkpoint_is_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    directory = checkpoint(tmp_path, shard_size="1GB")
    edit(directory, change)
    with pytest.raises(PaCAError, match=message):
        streamed(directory, NF4)


def test_what_the_model_ignores_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each tensor: checkpoints of experts may have many thousands."""
    directory = checkpoint(tmp_path, shard_size="1GB")
    edit(directory, lambda tensors: tensors.update({f"vision.{i}.weight": torch.zeros(2) for i in range(50)}))
    asked: list[nn.Module] = []

    def patterns(module: nn.Module) -> set[str]:
        asked.append(module)
        return {r"^vision\."}

    monkeypatch.setattr("paca_lightning.strategies.fsdp2.streaming.ignored_keys", patterns)
    model = streamed(directory, DENSE)
    assert len(asked) == len(list(model.modules()))


def test_a_truncated_or_missing_file_is_named_with_one_of_its_tensors(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    file = directory / weight_map[K_PROJ]
    tensor = next(name for name, its_file in weight_map.items() if its_file == file.name)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(PaCAError, match=f"{file.name}', which holds '{tensor}', is missing or truncated"):
        streamed(directory, DENSE)
    file.unlink()
    with pytest.raises(PaCAError, match=f"{file.name}', which holds '{tensor}', is missing or truncated"):
        streamed(directory, DENSE)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"has neither model.safetensors.index.json nor model.safetensors"):
        RowReader(tmp_path)


def test_a_meta_model_without_a_checkpoint_initialises_itself() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    apply_paca(model, DENSE)
    materialize(model, torch.device("cpu"))
    expected = tiny_llama().model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    for _, layer in paca_layers(model):
        assert not layer.paca_delta.any()
        assert torch.equal(layer.weight[:, layer.paca_indices], layer.paca_base_columns)
    # Random weights predict about as well as a guess among all tokens.
    assert model(input_ids=IDS, labels=IDS).loss.item() == pytest.approx(math.log(model.config.vocab_size), rel=0.1)


def test_a_module_that_cannot_initialise_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.table = nn.Module()
    model.table.register_parameter("values", nn.Parameter(torch.zeros(2, 2, device="meta")))
    with pytest.raises(PaCAError, match=r"'table' \(Module\) is on the meta device and cannot be initialised"):
        materialize(model, torch.device("cpu"))
