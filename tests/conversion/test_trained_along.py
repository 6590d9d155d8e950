"""Norms and biases that are trained along with the columns, beside a plain reference."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    apply_paca,
    attach,
    disable_paca,
    export_lora,
    load_adapter,
    merge,
    save_adapter,
    unload,
)
from tests.plain_training import column_masks, train_masked
from tests.tiny import tiny_llama

CONFIG = PaCAConfig(r=4, train_norms=True)
IDS = torch.randint(384, (2, 12), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int, lr: float = 1e-3, accumulate: int = 1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    attach(optimizer, model)
    for _ in range(steps):
        optimizer.zero_grad()
        for part in IDS.chunk(accumulate):
            (model(input_ids=part, labels=part).loss / accumulate).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]) for name, tensor in found.items()
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_are_those_of_the_dense_model_with_all_other_columns_masked(accumulate: int) -> None:
    model, dense = tiny_llama(attention_bias=True).double(), tiny_llama(attention_bias=True).double()
    apply_paca(model, PaCAConfig(r=4, train_norms=True, train_biases=True))
    masks = column_masks(dense, model)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in masks or parameter.dim() == 1)
    train_masked(dense, masks, lambda each: each(input_ids=IDS, labels=IDS).loss, 20, lr=1e-3)
    train(model, 20, accumulate=accumulate)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-9)  # sums in another order
    assert not torch.equal(dense.model.norm.weight, tiny_llama().double().model.norm.weight)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_in_bf16_small_steps_count_and_all_goes_back_bitwise(tmp_path: Path, quantize: str | None) -> None:
    base = tiny_llama(attention_bias=True).bfloat16()
    model = copy.deepcopy(base)
    apply_paca(model, PaCAConfig(r=4, train_norms=True, train_biases=True, quantize=quantize))
    model.bfloat16()
    before = state(model)
    train(model, 5, lr=1e-5)  # each step is lost in a bf16 weight of 1
    norm = model.model.norm
    assert norm.weight.dtype == torch.float32
    assert 0 < float((norm.weight.detach() - 1).abs().max()) < 1e-4
    trained = model.eval()(input_ids=IDS).logits
    with disable_paca(model):
        assert same({"weight": norm.weight}, {"weight": before["model.norm.weight"]})

    save_adapter(model, tmp_path)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    assert same(state(loaded), state(model))
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, trained)
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, trained)
    merge(loaded)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    if quantize is None:
        assert torch.equal(loaded(input_ids=IDS).logits, trained)
        assert same(state(unload(model)), state(base))
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]


def test_a_resumed_model_ends_bitwise_alike_and_still_knows_the_base() -> None:
    whole, first, second = (tiny_llama() for _ in range(3))
    for model in (whole, first, second):
        apply_paca(model, CONFIG)
    optimizers = []
    for model in (whole, first, second):
        optimizers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    for model, optimizer, steps in ((whole, optimizers[0], 4), (first, optimizers[1], 2), (second, optimizers[2], 2)):
        attach(optimizer, model)  # before the state is loaded: weight decay makes a group for norms
        if model is second:
            second.load_state_dict(first.state_dict())
            optimizer.load_state_dict(optimizers[1].state_dict())
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    assert same(state(second), state(whole))
    assert same(state(unload(second)), state(tiny_llama()))


def test_what_was_frozen_by_hand_or_is_excluded_stays_frozen() -> None:
    model = nn.ModuleDict({"student": tiny_llama(), "teacher": tiny_llama().requires_grad_(False)})
    model["student"].model.norm.requires_grad_(False)
    report = apply_paca(model, PaCAConfig(r=4, train_norms=True, exclude_modules=[r".*layers\.0\.input_layernorm"]))
    norms = [name for name, p in model.named_parameters() if "norm" in name and p.requires_grad]
    paths = ("0.post_attention_layernorm", "1.input_layernorm", "1.post_attention_layernorm")
    assert norms == [f"student.model.layers.{path}.weight" for path in paths]
    assert "Trained along: norm weights, 3 tensors, 192 parameters" in str(report)


def test_mistakes_are_named_and_leave_the_model_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    before = state(model)
    with pytest.raises(PaCAError, match="train_biases=True, and there is no bias"):
        apply_paca(model, PaCAConfig(r=4, train_norms=True, train_biases=True))
    assert same(state(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(PaCAError, match="train_norms must be true or false"):
        PaCAConfig(train_norms="yes")  # type: ignore[arg-type]
    apply_paca(model, CONFIG)
    with pytest.raises(PaCAError, match=r"cannot hold 'model\..*norm.*export_merged"):
        export_lora(model, tmp_path)


def test_an_adapter_without_norms_brings_back_those_of_the_base(tmp_path: Path) -> None:
    columns, along = tiny_llama(), tiny_llama()
    apply_paca(columns, PaCAConfig(r=4))
    train(columns, 3)
    save_adapter(columns, tmp_path / "adapter")
    apply_paca(along, CONFIG)
    train(along, 3)
    load_adapter(along, tmp_path / "adapter")
    assert torch.equal(along(input_ids=IDS).logits, columns(input_ids=IDS).logits)
