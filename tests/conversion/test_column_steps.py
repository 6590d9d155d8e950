"""A step for each column that fits its input: exact, free of side effects, and what it does to an update."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    paca_layers,
    save_adapter,
    unload,
)
from paca_lightning.conversion.select import change_steps
from tests.layers.reference import batch, logits
from tests.tiny import tiny_llama

STEPS = torch.tensor([0.25, 1.0, 2.0, 8.0])


def spread(rows: int = 64) -> Tensor:
    """Inputs whose channels differ in size by known powers of two: rms 1/8, 1/4, ..., 16."""
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (rows, 8)) * 2.0 - 1.0
    return signs * 2.0 ** torch.arange(-3, 5)


def fitted(selection: str = "random", **settings: Any) -> nn.Module:
    """A layer with all its columns trained, whose steps were fitted to such inputs."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 6))
    config = PaCAConfig(r=8, selection=selection, column_steps="input_rms", **settings)
    apply_paca(model, config, calibration=[spread()])
    return model


def test_steps_are_the_layers_rms_over_the_columns_own_as_powers_of_two() -> None:
    ((_, layer),) = paca_layers(fitted())
    rms = spread().square().mean(0).sqrt()
    exact = spread().square().mean().sqrt() / rms  # about 6.5 / rms
    assert torch.equal(layer.paca_scale, 2.0 ** exact.log2().round().clamp(-3, 3))
    assert set(layer.paca_scale.tolist()) == {8.0, 4.0, 2.0, 1.0, 0.5}


@pytest.mark.parametrize("selection", ["activation_norm", "gradient_norm"])
def test_columns_chosen_by_data_have_steps_unless_told_otherwise(selection: str) -> None:
    for column_steps, expected in (("auto", True), ("equal", False)):
        model = tiny_llama()
        apply_paca(model, PaCAConfig(r=4, selection=selection, column_steps=column_steps), calibration=[batch()])
        assert (
            any(layer.paca_scale is not None and (layer.paca_scale != 1).any() for _, layer in paca_layers(model))
            is expected
        )


def test_random_columns_have_none() -> None:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    assert all(layer.paca_scale is None for _, layer in paca_layers(model))


def stepped(dtype: torch.dtype = torch.float32, quantize: str | None = None, alpha: float = 4) -> nn.Module:
    """A tiny Llama whose columns move by different steps."""
    model = tiny_llama().to(dtype)
    config = PaCAConfig(r=4, alpha=alpha, column_steps="input_rms", quantize=quantize)
    apply_paca(model, config, calibration=[batch()])
    for _, layer in paca_layers(model):
        change_steps(layer, STEPS)
    return model


def train(model: nn.Module, steps: int = 3, **settings: Any) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **settings)
    attach(optimizer, model)
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("alpha", [4, 6])
def test_twenty_steps_equal_masked_dense_training_with_the_steps_written_out(alpha: float) -> None:
    model = stepped(torch.float64, alpha=alpha)
    plain = tiny_llama().double().requires_grad_(False)
    layers = dict(paca_layers(model))
    base = {path: plain.get_submodule(path).weight.detach().clone() for path in layers}
    deltas = {path: torch.zeros_like(layer.paca_delta, requires_grad=True) for path, layer in layers.items()}
    optimizer = torch.optim.AdamW(list(deltas.values()), lr=1e-2)
    for _ in range(20):
        weights = {
            f"{path}.weight": base[path].index_add(1, layer.paca_indices, alpha / 4 * STEPS.double() * deltas[path])
            for path, layer in layers.items()
        }
        torch.func.functional_call(plain, weights, kwargs=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    train(model, 20)
    for path, layer in layers.items():
        torch.testing.assert_close(layer.paca_delta, deltas[path], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_update_leaves_and_enters_a_model_bit_by_bit(quantize: str | None, tmp_path: Path) -> None:
    model = train(stepped(quantize=quantize))
    save_adapter(model, tmp_path)
    other = tiny_llama()
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    save_adapter(other, tmp_path / "again")
    tensors = [path / "adapter_model.safetensors" for path in (tmp_path, tmp_path / "again")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_an_adapter_of_equal_steps_goes_on_with_others(tmp_path: Path) -> None:
    equal = tiny_llama()
    apply_paca(equal, PaCAConfig(r=4))
    save_adapter(train(equal), tmp_path)
    other = tiny_llama()
    load_adapter(other, tmp_path)
    before = logits(other)
    for _, layer in paca_layers(other):
        layer.paca_scale = torch.ones(4)
        change_steps(layer, STEPS)
    assert torch.equal(logits(other), before)


def test_merge_unload_and_disable_know_the_steps() -> None:
    model, base = train(stepped()), logits(tiny_llama())
    trained = logits(model)
    with disable_paca(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(
        logits(merge(copy.deepcopy(model))[0] if isinstance(merge(copy.deepcopy(model)), tuple) else model), trained
    )
    unload(model)
    assert torch.equal(logits(model), base)


def test_a_lora_export_holds_the_update(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = train(stepped())
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("here", [True, False])
def test_a_state_dict_brings_its_steps(here: bool) -> None:
    model = train(stepped())
    fresh = tiny_llama()
    if here:
        fresh = stepped()
        for _, layer in paca_layers(fresh):
            change_steps(layer, torch.ones(4))
    else:
        apply_paca(fresh, PaCAConfig(r=4))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    train(fresh, 2)
    train(model, 2)
    assert torch.equal(logits(fresh), logits(model))


def test_a_state_dict_without_steps_has_equal_ones() -> None:
    equal = tiny_llama()
    apply_paca(equal, PaCAConfig(r=4))
    train(equal)
    model = stepped()
    model.load_state_dict(equal.state_dict())
    assert torch.equal(logits(model), logits(equal))


def test_steps_survive_a_cast() -> None:
    model = stepped().bfloat16()
    for _, layer in paca_layers(model):
        assert layer.paca_scale.dtype == torch.float32
        assert torch.equal(layer.paca_scale, STEPS)


def test_data_is_asked_for() -> None:
    with pytest.raises(PaCAError, match="column_steps='input_rms' looks at data: pass calibration="):
        apply_paca(tiny_llama(), PaCAConfig(r=4, column_steps="input_rms"))
    with pytest.raises(PaCAError, match="column_steps='rms' is unknown"):
        PaCAConfig(column_steps="rms")


def interrupted() -> Iterator[Tensor]:
    yield batch()
    raise KeyboardInterrupt


@pytest.mark.parametrize(("calibration", "error"), [([], PaCAError), (interrupted(), KeyboardInterrupt)])
def test_batches_that_end_early_leave_the_model_as_it_was(calibration: Any, error: type[BaseException]) -> None:
    model, untouched = tiny_llama(), tiny_llama()
    with pytest.raises(error):
        apply_paca(model, PaCAConfig(r=4, column_steps="input_rms", quantize="nf4"), calibration=calibration)
    assert not any(paca_layers(model))
    assert model.state_dict().keys() == untouched.state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), untouched.state_dict().values()))
    assert all(parameter.requires_grad for parameter in model.parameters())
