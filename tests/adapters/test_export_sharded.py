"""Exports of a sharded model equal those of a whole one, and gather one tensor at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from paca_lightning import PaCAConfig, apply_paca, export_lora, export_merged, paca_layers, write_columns
from paca_lightning.activation_checkpointing.blocks import find_blocks
from paca_lightning.core.dtensor import copy_into
from paca_lightning.strategies.fsdp2.sharding import ShardingOptions, shard
from tests.distributed_launch import launch
from tests.peak_memory import peak_bytes
from tests.tiny import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*were trained on an NF4 base")

CONFIGS = {
    "dense": PaCAConfig(r=4, alpha=6, modules_to_save=["norm"]),
    "NF4": PaCAConfig(r=4, quantize="nf4"),
    "tied": PaCAConfig(r=4),
}


def trained(name: str, *, sharded: bool) -> nn.Module:
    """A converted model of odd sizes with trained columns."""
    model = tiny_llama(hidden_size=128, intermediate_size=97, vocab_size=383, tie_word_embeddings=name == "tied")
    apply_paca(model, CONFIGS[name])
    if sharded:
        shard(model, init_device_mesh("cpu", (2,)), find_blocks(model), ShardingOptions())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in paca_layers(model):
            copy_into(layer.paca_delta, 0.02 * torch.randn(layer.out_features, layer.r, generator=generator))
    write_columns(model)
    return model


def export_all(directory: Path, *, sharded: bool) -> dict[str, int]:
    """Export every configuration. Returns the peak memory of each merged export on this rank."""
    peaks = {}
    for name in CONFIGS:
        model = trained(name, sharded=sharded)
        export_lora(model, directory / name / "lora")
        peaks[name] = peak_bytes(lambda model=model, name=name: export_merged(model, directory / name / "merged"))
    return peaks


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("exports")
    peaks = launch(export_sharded, 2, base / "sharded")
    export_all(base / "whole", sharded=False)
    return {"directory": base, "peaks": peaks}


def export_sharded(directory: Path) -> dict[str, int]:
    return export_all(directory, sharded=True)


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["merged", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sharded_model_exports_what_a_whole_one_does(exports: dict[str, Any], name: str, kind: str) -> None:
    sharded, whole = (exports["directory"] / where / name / kind for where in ("sharded", "whole"))
    assert sorted(file.name for file in sharded.iterdir()) == sorted(file.name for file in whole.iterdir())
    found, expected = tensors(sharded), tensors(whole)
    assert expected
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    for file in whole.glob("*.json"):
        assert (sharded / file.name).read_text() == file.read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_first_rank_keeps_what_is_gathered(exports: dict[str, Any], name: str) -> None:
    state = tensors(exports["directory"] / "whole" / name / "merged").values()
    total, largest = sum(tensor.nbytes for tensor in state), max(tensor.nbytes for tensor in state)
    first, second = (peaks[name] for peaks in exports["peaks"])
    assert first >= total
    assert second <= 4 * largest < 0.9 * total
