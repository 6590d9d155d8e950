"""An inventory knows a model's structure after one pass, and a conversion needs no more than three."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from paca_lightning import PaCAConfig, PaCAError, apply_paca, paca_layers
from paca_lightning.conversion.inventory import take_inventory
from tests.tiny import tiny_llama


@pytest.fixture
def traversals(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The roots of all walks over modules: named_modules is behind modules, parameters, named_parameters, ..."""
    roots: list[nn.Module] = []
    original = nn.Module.named_modules
    depth = 0

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal depth
        if depth == 0:
            roots.append(self)
        walk = original(self, *args, **kwargs)
        while True:
            depth += 1
            try:
                found = next(walk)
            except StopIteration:
                return
            finally:
                depth -= 1
            yield found

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    return roots


@pytest.mark.parametrize(
    "config",
    [
        PaCAConfig(r=4),
        PaCAConfig(r=4, selection="weight_norm", modules_to_save=["lm_head"]),
        PaCAConfig(r=4, quantize="nf4", selection="quant_error"),
    ],
    ids=["default", "saved", "nf4"],
)
def test_apply_paca_walks_over_the_model_at_most_three_times(config: PaCAConfig, traversals: list[nn.Module]) -> None:
    model = tiny_llama()
    traversals.clear()
    apply_paca(model, config)
    assert 1 <= sum(root is model for root in traversals) <= 3


def test_the_base_model_is_found_inside_a_module_around_it() -> None:
    outer = nn.ModuleDict({"teacher_head": nn.Linear(8, 8), "student": tiny_llama()})
    inventory = take_inventory(outer)
    assert inventory.base_model is outer["student"]
    assert inventory.prefix == "student."
    assert inventory.relative("student.lm_head") == "lm_head"
    assert inventory.relative("teacher_head") == "teacher_head"
    assert inventory.heads.all == {outer["student"].lm_head}
    assert not inventory.heads.over_classes


def test_each_parameter_has_one_name_and_all_its_owners() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    inventory = take_inventory(model)
    assert dict(inventory.parameters) == dict(model.named_parameters())
    assert inventory.owners[model.lm_head.weight] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert inventory.owners[model.model.norm.weight] == ["model.norm.weight"]


def test_a_module_in_two_places_has_both_paths_and_is_not_tied_to_itself() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared})
    inventory = take_inventory(model)
    assert inventory.paths[shared] == ["first", "second"]
    assert inventory.owners[shared.weight] == ["first.weight"]
    apply_paca(model, PaCAConfig(r=2, target_modules=["second"]))
    assert [path for path, _ in paca_layers(model)] == ["first"]


def test_wrappers_leave_no_segment_in_a_path() -> None:
    model = nn.ModuleDict({"block": torch.compile(nn.Sequential(nn.Linear(4, 4)))})
    assert "block.0" in [path for paths in take_inventory(model).paths.values() for path in paths]


def test_two_layers_of_one_name_in_an_adapter_are_refused() -> None:
    outer = nn.ModuleDict({"lm_head": nn.Linear(8, 8), "inner": tiny_llama()})
    apply_paca(outer, PaCAConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(PaCAError, match="Two layers are called 'lm_head', one inside the base model"):
        take_inventory(outer).named_layers()


def test_layers_of_a_peft_adapter_are_left_alone() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(tiny_llama(), lora)
    report = apply_paca(model, PaCAConfig(r=4))
    assert {path.rpartition(".")[2] for path, _ in paca_layers(model)} == {
        "k_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    reasons = {path: reason for path, reason in report.skipped.items() if "lora_A" in path or "base_layer" in path}
    assert len(reasons) == 8  # two projections in two blocks
    assert all("part of a PEFT adapter" in reason for reason in reasons.values())


def test_a_model_whose_layers_all_carry_a_peft_adapter_is_refused_with_the_way_out() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(PaCAError, match=r"merge_and_unload\(\)"):
        apply_paca(model, PaCAConfig(r=4))
    assert not list(paca_layers(model))


def test_two_parameters_on_one_memory_are_tied() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "third": nn.Linear(4, 4)})
    model["second"].weight = nn.Parameter(model["first"].weight.detach())
    report = apply_paca(model, PaCAConfig(r=2))
    assert [path for path, _ in paca_layers(model)] == ["third"]
    assert report.skipped == {"first": "weight tied to second.weight", "second": "weight tied to first.weight"}


def test_slices_of_one_buffer_are_not_tied() -> None:
    flat = torch.randn(32)
    model = nn.ModuleDict({"first": nn.Linear(4, 4, bias=False), "second": nn.Linear(4, 4, bias=False)})
    for layer, part in zip(model.values(), flat.split(16), strict=True):
        layer.weight = nn.Parameter(part.view(4, 4))
    apply_paca(model, PaCAConfig(r=2))
    assert [path for path, _ in paca_layers(model)] == ["first", "second"]
