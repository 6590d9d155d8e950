"""What changes beside the deltas belongs to the adapter, and goes when PaCA goes."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import (
    PaCAConfig,
    apply_paca,
    attach,
    disable_paca,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from tests.tiny import tiny_llama

INPUT = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def trained(thaw: bool = True, closure: bool = False) -> nn.Sequential:
    """A network after some steps, in which the norm's scale was thawed for a while; gradients by closures if asked."""
    model = network()
    apply_paca(model, PaCAConfig(r=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    attach(optimizer, model)
    for step in range(6):
        if thaw and step == 2:
            model[1].weight.requires_grad_(True)
            optimizer.add_param_group({"params": [model[1].weight]})
        if step == 4:
            model[1].requires_grad_(False)
        optimizer.zero_grad()
        evaluate = functools.partial(backward, model)
        if closure:  # as Lightning does
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    return model


def backward(model: nn.Module) -> Tensor:
    loss: Tensor = model(INPUT).square().mean()
    loss.backward()
    return loss.detach()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_an_adapter_brings_thawed_parameters_and_running_statistics(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path / "adapter")
    other = network()
    load_adapter(other, tmp_path / "adapter")
    assert_same(state(other), state(model))
    assert torch.equal(other.eval()(INPUT), model.eval()(INPUT))


def test_an_adapter_that_was_loaded_is_saved_whole_again(tmp_path: Path) -> None:
    model, other, third = trained(), network(), network()
    save_adapter(model, tmp_path / "first")
    load_adapter(other, tmp_path / "first")
    save_adapter(other, tmp_path / "second")
    load_adapter(third, tmp_path / "second")
    assert_same(state(third), state(model))


def test_inside_disable_paca_all_is_the_base_model_and_comes_back() -> None:
    model, base = trained(), network()
    before = state(model)
    with disable_paca(model), torch.no_grad():
        assert torch.equal(model.eval()(INPUT), base.eval()(INPUT))
    assert_same(state(model), before)


@pytest.mark.parametrize("closure", [False, True])
def test_unload_gives_the_base_model_back(closure: bool) -> None:
    model = trained(closure=closure)
    unload(model)
    assert_same(state(model), state(network()))


def test_unload_after_loading_gives_the_base_model_back(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path / "adapter")
    model = network()
    load_adapter(model, tmp_path / "adapter")
    unload(model)
    assert_same(state(model), state(network()))


def test_merge_keeps_what_changed() -> None:
    model = trained()
    output = model.eval()(INPUT)
    merge(model)
    torch.testing.assert_close(model(INPUT), output, rtol=0, atol=0)


def test_a_copy_keeps_its_own_originals() -> None:
    model = trained()
    other = copy.deepcopy(model)
    unload(model)
    unload(other)
    assert_same(state(other), state(network()))


def test_a_model_in_which_nothing_else_changes_has_no_more_in_its_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=2))
    save_adapter(model, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith((".paca_delta", ".paca_indices")) for name in names)


def test_norms_thawed_inside_a_module_around_a_model_are_named_from_the_model(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": tiny_llama()})
    apply_paca(model, PaCAConfig(r=2))
    norm = model["model"].model.norm
    norm.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(optimizer, model)
    ids = torch.arange(12)[None]
    model["model"](input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    save_adapter(model, tmp_path / "adapter")
    bare = tiny_llama()
    load_adapter(bare, tmp_path / "adapter")
    assert torch.equal(bare.model.norm.weight, norm.weight)
    assert not torch.equal(bare.model.norm.weight, tiny_llama().model.norm.weight)
