"""Going back leaves a model as it was: what required a gradient, what is enabled, what a shard refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach, disable_paca, merge, paca_layers, unload
from paca_lightning.core.checksums import tensor_checksum
from tests.layers.test_linear4bit import with_linear4bit
from tests.moe import tiny_moe
from tests.tiny import tiny_llama

CONFIG = PaCAConfig(r=2)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [CONFIG, PaCAConfig(r=2, quantize="nf4", modules_to_save=["lm_head"])])
def test_unload_gives_requires_grad_back(config: PaCAConfig) -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    before = flags(model)
    apply_paca(model, config)
    apply_paca(model, config)  # twice is once
    unload(model)
    assert flags(model) == before


def test_unload_of_a_part_gives_its_requires_grad_back() -> None:
    model = nn.ModuleDict({"model": tiny_llama(), "head": nn.Linear(4, 4)})
    before = flags(model["model"])
    apply_paca(model, CONFIG)
    unload(model["model"])
    assert flags(model["model"]) == before


def all_bits(model: nn.Module) -> dict[str, tuple[str, str | None, bool]]:
    """Class of each module, every bit of each tensor and whether it is trained, by path."""
    modules = {path: (type(module).__name__, None, module.training) for path, module in model.named_modules()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules | {name: (str(t.dtype), tensor_checksum(t), t.requires_grad) for name, t in tensors}


def llama_with_linear4bit() -> nn.Module:
    return with_linear4bit(tiny_llama(), (f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)))


@pytest.mark.parametrize("layers", [3, 4, 5], ids="{} layers are converted".format)
@pytest.mark.parametrize("build", [tiny_llama, llama_with_linear4bit, lambda: tiny_moe("mixtral")])
def test_memory_that_runs_out_within_a_layer_leaves_the_model_as_it_was(
    build: Callable[[], nn.Module], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    before, deltas, zeros_like = all_bits(model), 0, torch.zeros_like

    def run_out(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal deltas
        deltas += 1
        if deltas > layers:
            raise torch.OutOfMemoryError("out of memory")
        return zeros_like(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            apply_paca(model, CONFIG)
    assert all_bits(model) == before
    assert len(apply_paca(model, CONFIG).layers) > layers


def test_an_error_while_paca_is_disabled_leaves_every_layer_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    layers = [layer for _, layer in paca_layers(model)]
    with torch.no_grad():
        for layer in layers:
            layer.paca_delta.normal_()
            layer.write_columns()
    weights = [layer.weight.clone() for layer in layers]

    def fails() -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(layers[3], "restore_columns", fails)
    with pytest.raises(RuntimeError, match="no memory"), disable_paca(model):
        raise AssertionError("entered")
    assert all(layer.paca_enabled for layer in layers)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))


def test_an_original_that_was_never_known_leaves_every_layer_enabled() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    apply_paca(model, PaCAConfig(r=2, modules_to_save=["1"]))
    model.to_empty(device="cpu")
    with pytest.raises(PaCAError, match="original values are unknown"), disable_paca(model):
        raise AssertionError("entered")
    assert model[0].paca_enabled


@pytest.fixture
def sharded() -> nn.Sequential:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_paca(model, CONFIG)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


@pytest.mark.parametrize("back", [merge, unload])
def test_a_sharded_model_is_refused_and_goes_on_training(back: object, sharded: nn.Sequential) -> None:
    with pytest.raises(PaCAError, match=rf"{back.__name__}: '0' is sharded by FSDP2.*export_merged"):  # type: ignore[attr-defined]
        back(sharded)  # type: ignore[operator]
    optimizer = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
    attach(optimizer, sharded)
    sharded(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    assert all(bool(layer.paca_delta.full_tensor().any()) for _, layer in paca_layers(sharded))
