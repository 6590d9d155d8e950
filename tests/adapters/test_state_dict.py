"""A module's state dict holds what was trained, and takes back what it, or a base model, wrote."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, attach, merge, paca_layers, unload, write_columns
from paca_lightning.adapters.state_dict import keep_everything, keep_trained_state


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2))


def tuned(seed: int = 0, **settings: object) -> nn.Sequential:
    """The converted network with a trained delta and a head trained whole."""
    model = network(seed)
    apply_paca(model, PaCAConfig(**({"r": 2, "alpha": 3.0, "modules_to_save": ["4"]} | settings)))
    keep_trained_state(model)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    write_columns(model)
    return model


def fresh(**settings: object) -> nn.Sequential:
    """The same network, converted with another seed and not trained."""
    model = network()
    apply_paca(model, PaCAConfig(**({"r": 2, "alpha": 3.0, "modules_to_save": ["4"], "seed": 9} | settings)))
    keep_trained_state(model)
    return model


ADAPTER = {"0.paca_delta", "0.paca_indices", "3.paca_delta", "3.paca_indices"}
BUFFERS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
HEAD = {"4.weight", "4.bias"}


def test_frozen_weights_are_left_out() -> None:
    assert set(tuned().state_dict()) == ADAPTER | BUFFERS | HEAD


def test_all_comes_back_on_demand() -> None:
    model = tuned()
    everything = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    keep_everything(model)
    assert set(model.state_dict()) == everything


def test_what_is_unfrozen_later_is_kept() -> None:
    model = tuned()
    model[1].weight.requires_grad_(True)
    assert set(model.state_dict()) == ADAPTER | BUFFERS | HEAD | {"1.weight"}


def test_hooking_twice_is_hooking_once() -> None:
    model = tuned()
    keep_trained_state(model)
    assert len(model._state_dict_hooks) == len(model._load_state_dict_post_hooks) == 1


def test_inside_another_module_only_its_own_weights_are_left_out() -> None:
    outer = nn.ModuleDict({"0": nn.Linear(2, 2), "net": tuned()})  # has a "0.weight", as the network does
    assert set(outer.state_dict()) == {"0.weight", "0.bias"} | {f"net.{name}" for name in ADAPTER | BUFFERS | HEAD}


def test_an_adapter_only_file_brings_the_trained_model_back_bitwise() -> None:
    trained, model = tuned(), fresh()
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    result = model.load_state_dict(torch.load(file, weights_only=True), strict=True)  # nothing is missed
    assert result.missing_keys == result.unexpected_keys == []
    assert not torch.equal(model[0].weight, network()[0].weight)
    for name, parameter in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_full_file_brings_the_trained_model_back_onto_any_base() -> None:
    trained = tuned()
    keep_everything(trained)
    model = network(seed=7)
    apply_paca(model, PaCAConfig(r=2, alpha=3.0, seed=9, modules_to_save=["4"]))
    model.load_state_dict(trained.state_dict())
    for name, parameter in trained.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_base_file_replaces_the_base_under_the_deltas() -> None:
    model, other = tuned(), network(seed=7)
    deltas = {path: layer.paca_delta.detach().clone() for path, layer in paca_layers(model)}
    model.load_state_dict(other.state_dict(), strict=False)
    for path, layer in paca_layers(model):
        expected = other.get_parameter(f"{path}.weight").detach().clone()
        columns = expected[:, layer.paca_indices].add(deltas[path], alpha=1.5)
        assert torch.equal(layer.weight, expected.index_copy(1, layer.paca_indices, columns))


def test_a_deep_copy_keeps_the_hooks_to_itself() -> None:
    model = tuned()
    other = copy.deepcopy(model)
    keep_everything(model)
    assert set(other.state_dict()) == ADAPTER | BUFFERS | HEAD


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


def test_a_file_of_other_layers_is_refused() -> None:
    with pytest.raises(PaCAError, match=r"The checkpoint trains '3' \(1 such layers\), which is not a PaCA layer"):
        fresh(target_modules=["0"]).load_state_dict(tuned().state_dict(), strict=False)
    with pytest.raises(PaCAError, match=r"The checkpoint has nothing for the PaCA layer '3' \(1 such layers\)"):
        fresh().load_state_dict(tuned(target_modules=["0"]).state_dict(), strict=False)


def test_an_empty_or_incomplete_file_is_refused() -> None:
    with pytest.raises(PaCAError, match=r"The checkpoint has nothing for the PaCA layer '0' \(2 such layers\)"):
        fresh().load_state_dict({}, strict=False)
    state = tuned().state_dict()
    with pytest.raises(PaCAError, match="The checkpoint has paca_delta of '3' but not its paca_indices"):
        fresh().load_state_dict(without(state, "3.paca_indices"), strict=False)
    for strict in (True, False):
        with pytest.raises(PaCAError, match=r"nothing for '4\.weight', which this run trains whole"):
            fresh().load_state_dict(without(state, "4.weight"), strict=strict)


def test_a_file_of_another_rank_is_refused() -> None:
    with pytest.raises(
        PaCAError, match=r"The delta of '0' has shape \(6, 2\) in the checkpoint and \(6, 3\) in the model"
    ):
        fresh(r=3).load_state_dict(tuned().state_dict(), strict=False)


@pytest.mark.parametrize("back", [merge, unload])
def test_a_plain_model_again_is_as_strict_as_ever(back: Any) -> None:
    model = tuned()
    back(model)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight"'):
        model.load_state_dict({}, strict=True)
    missing = set(model.load_state_dict({}, strict=False).missing_keys)
    assert missing == set(network().state_dict()) - {"1.num_batches_tracked"}  # which PyTorch lets old files lack


def test_only_frozen_weights_may_be_absent() -> None:
    state = tuned().state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1\.running_mean"\.'):
        fresh().load_state_dict(without(state, "1.running_mean"), strict=True)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "2\.weight"\.'):
        fresh().load_state_dict(state | {"2.weight": torch.zeros(1)}, strict=True)


def test_a_base_file_is_complete() -> None:
    result = tuned().load_state_dict(network(seed=7).state_dict(), strict=True)
    assert result.missing_keys == result.unexpected_keys == []


def test_a_parameter_that_was_thawed_and_trained_for_a_while_is_kept() -> None:
    model = tuned()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(optimizer, model)

    def step() -> None:
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": [model[1].weight]})  # as BackboneFinetuning does; the bias is only thawed
    step()
    model[1].requires_grad_(False)
    step()
    assert set(model.state_dict()) == ADAPTER | BUFFERS | HEAD | {"1.weight"}
    keep_trained_state(model)  # a later run
    assert set(model.state_dict()) == ADAPTER | BUFFERS | HEAD | {"1.weight"}
    other = fresh()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other[1].weight, model[1].weight)


def test_a_frozen_parameter_in_the_optimizer_is_kept_once_it_is_trained() -> None:
    model = tuned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # frozen ones, too
    attach(optimizer, model)
    assert set(model.state_dict()) == ADAPTER | BUFFERS | HEAD
    model[1].bias.requires_grad_(True)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    model[1].bias.requires_grad_(False)
    assert set(model.state_dict()) == ADAPTER | BUFFERS | HEAD | {"1.bias"}


def test_what_an_earlier_run_thawed_stays_in_checkpoints_and_goes_with_unload() -> None:
    model = tuned()
    model[1].weight.requires_grad_(True)
    attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model)
    with torch.no_grad():
        model[1].weight.add_(1.0)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    resumed = fresh()
    resumed.load_state_dict(saved)
    found = resumed.state_dict()
    assert found.keys() == saved.keys() == ADAPTER | BUFFERS | HEAD | {"1.weight"}
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    unload(resumed)
    assert torch.equal(resumed[1].weight, network()[1].weight)


def test_a_base_checkpoint_thaws_nothing() -> None:
    model = fresh()
    model.load_state_dict(network(seed=1).state_dict())
    assert set(model.state_dict()) == ADAPTER | BUFFERS | HEAD
    full = tuned()
    keep_everything(full)
    model.load_state_dict(full.state_dict())
    assert set(model.state_dict()) == ADAPTER | BUFFERS | HEAD
