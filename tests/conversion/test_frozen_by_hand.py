"""What the user froze stays frozen: a critic or a teacher beside a model that trains."""

from pathlib import Path

import pytest
import torch
from torch import nn

from paca_lightning import PaCAConfig, apply_paca, load_adapter, paca_layers, save_adapter, unload
from tests.tiny import tiny_llama

CONFIG = PaCAConfig(r=2)
REASON = "frozen before the conversion (include_frozen=True converts it)"


def converted(model: nn.Module) -> set[str]:
    return {path for path, _ in paca_layers(model)}


def actor_and_critic() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"actor": nn.Sequential(nn.Linear(4, 4)), "critic": nn.Sequential(nn.Linear(4, 4))})
    model["critic"].requires_grad_(False)
    return model


def test_a_frozen_critic_stays_frozen_and_is_reported() -> None:
    model = actor_and_critic()
    report = apply_paca(model, CONFIG)
    assert converted(model) == {"actor.0"}
    assert report.skipped == {"critic.0": REASON}
    assert f"Left alone: critic.0: {REASON}." in str(report)
    apply_paca(model, CONFIG)  # twice is once, though everything is frozen now
    assert converted(model) == {"actor.0"}


def test_include_frozen_converts_it() -> None:
    model = actor_and_critic()
    apply_paca(model, PaCAConfig(r=2, include_frozen=True))
    assert converted(model) == {"actor.0", "critic.0"}


def test_a_layer_that_is_named_is_converted() -> None:
    model = actor_and_critic()
    apply_paca(model, PaCAConfig(r=2, target_modules=["critic.0"]))
    assert converted(model) == {"critic.0"}


def test_a_model_frozen_as_a_whole_is_converted_and_the_report_says_so() -> None:
    model = nn.ModuleDict({"model": tiny_llama().requires_grad_(False), "value_head": nn.Linear(64, 1)})
    report = apply_paca(model, CONFIG)
    assert len(converted(model["model"])) == 14
    assert report.thawed == "LlamaForCausalLM"
    assert "All linear layers of LlamaForCausalLM were frozen before; they are converted all the same." in str(report)
    plain = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    assert apply_paca(plain, CONFIG).thawed == "Sequential"


def test_a_trainable_output_head_does_not_make_a_frozen_model_trainable() -> None:
    model = tiny_llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    apply_paca(model, PaCAConfig(r=2, modules_to_save=["lm_head"]))
    assert len(converted(model)) == 14


@pytest.mark.parametrize("student_first", [True, False])
def test_a_frozen_teacher_beside_a_student_stays_frozen(student_first: bool) -> None:
    student, teacher = tiny_llama(), tiny_llama(seed=1).requires_grad_(False)
    pair = {"student": student, "teacher": teacher}
    model = nn.ModuleDict(pair if student_first else dict(reversed(pair.items())))
    apply_paca(model, CONFIG)
    assert len(converted(student)) == 14
    assert converted(teacher) == set()


def test_a_quantized_base_counts_as_trainable() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    model = nn.ModuleDict({"base": nn.Sequential(quantized), "adapter": nn.Linear(64, 64)})
    apply_paca(model, CONFIG)
    assert converted(model) == {"base.0", "adapter"}


def test_an_adapter_goes_onto_layers_that_are_frozen_now(tmp_path: object) -> None:
    model = actor_and_critic().requires_grad_(True)
    apply_paca(model, CONFIG)
    save_adapter(model, f"{tmp_path}/adapter")
    other = actor_and_critic()
    load_adapter(other, f"{tmp_path}/adapter")
    assert converted(other) == {"actor.0", "critic.0"}


def test_an_adapter_leaves_alone_what_its_training_left_alone(tmp_path: Path) -> None:
    trained = actor_and_critic()
    apply_paca(trained, CONFIG)
    save_adapter(trained, tmp_path / "first")

    model = actor_and_critic().requires_grad_(True)  # as for an evaluation: nobody freezes anything
    report = load_adapter(model, tmp_path / "first")
    assert converted(model) == {"actor.0"}
    assert report.skipped == {"critic.0": REASON}
    load_adapter(model, tmp_path / "first")  # into the converted model
    save_adapter(nn.ModuleDict({"inner": model}), tmp_path / "second")
    around = nn.ModuleDict({"inner": actor_and_critic().requires_grad_(True)})
    load_adapter(around, tmp_path / "second")
    assert converted(around) == {"inner.actor.0"}
    unload(around)
    assert all(parameter.requires_grad for parameter in around.parameters())
    apply_paca(around, CONFIG)
    assert converted(around) == {"inner.actor.0", "inner.critic.0"}
