"""A conversion has one owner of what it knows: found from every part of a model, copied and pickled with it."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, merge, paca_layers, save_adapter, unload
from paca_lightning.conversion.state import conversion_of, root_names
from tests.tiny import tiny_llama

CONFIG = PaCAConfig(r=2)


def two_parts() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 8)), "decoder": nn.Sequential(nn.Linear(8, 8))})


def test_the_model_its_parts_and_a_module_around_it_share_one_conversion() -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    conversion = conversion_of(model)
    assert conversion is not None
    assert conversion.config == CONFIG
    assert conversion_of(nn.ModuleDict({"model": model})) is conversion
    assert conversion_of(model.model.layers[1].mlp) is conversion
    assert conversion_of(model.lm_head) is None


def test_names_of_a_part_and_of_a_module_around_are_counted_from_the_root() -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    assert root_names(model)(name) == name
    assert root_names(model.model.layers[1].mlp)("up_proj.weight") == name
    assert root_names(model.model.layers[1].mlp.up_proj)("weight") == name
    around = root_names(nn.ModuleDict({"inner": model, "other": nn.Linear(2, 2)}))
    assert around(f"inner.{name}") == name
    assert around("other.weight") is None


def test_a_conversion_around_an_earlier_one_takes_over_what_it_knows() -> None:
    inner = tiny_llama()
    inner.model.norm.weight.requires_grad_(False)
    apply_paca(inner, CONFIG)
    inner.lm_head.weight.requires_grad_(True)  # thawed by the user since
    outer = nn.ModuleDict({"model": inner, "critic": nn.Linear(8, 8)})
    apply_paca(outer, CONFIG)
    conversion = conversion_of(inner)
    assert conversion is conversion_of(outer)
    assert inner.lm_head.weight.requires_grad
    assert conversion.was_trainable["model.lm_head.weight"]
    assert not conversion.was_trainable["model.model.norm.weight"]
    assert conversion.was_trainable["critic.weight"]
    assert all(layer.paca_path == path for path, layer in paca_layers(outer))


def test_copies_and_pickles_have_a_conversion_of_their_own() -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        own = conversion_of(other)
        assert own is not None
        assert own is not conversion_of(model)
        assert own.config == CONFIG
        assert len({id(layer.paca_conversion) for _, layer in paca_layers(other)}) == 1


@pytest.mark.parametrize("back", [merge, unload])
def test_nothing_is_known_after_going_back(back: object) -> None:
    model = tiny_llama()
    apply_paca(model, CONFIG)
    back(model)  # type: ignore[operator]
    assert conversion_of(model) is None
    apply_paca(model, PaCAConfig(r=4))  # another configuration: nothing of the first is left
    assert conversion_of(model).config.r == 4


def test_parts_with_different_configurations_are_saved_apart(tmp_path: Path) -> None:
    model = two_parts()
    apply_paca(model["encoder"], PaCAConfig(r=2))
    apply_paca(model["decoder"], PaCAConfig(r=4, seed=3))
    message = r"'encoder\.0' and 'decoder\.0' were converted with different configurations .*\['r', 'seed'\]"
    with pytest.raises(PaCAError, match=message):
        save_adapter(model, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    for name in ("encoder", "decoder"):
        save_adapter(model[name], tmp_path / name)
        assert (tmp_path / name / "adapter_config.json").is_file()


def test_a_second_conversion_that_fails_leaves_the_first_one() -> None:
    model, config = two_parts(), PaCAConfig(r=2, quantize="nf4")
    apply_paca(model["encoder"], config)
    first = conversion_of(model)
    before = dict(first.was_trainable)
    with torch.no_grad():
        model["decoder"][0].weight.fill_(float("nan"))
    with pytest.raises(PaCAError, match="holds NaN or infinite"):
        apply_paca(model, config)
    assert conversion_of(model) is first
    assert [layer.paca_path for _, layer in paca_layers(model)] == ["0"]
    assert first.was_trainable == before
    assert model["decoder"][0].weight.requires_grad
