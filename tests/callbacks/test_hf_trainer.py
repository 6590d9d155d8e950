"""PaCATrainerCallback in Hugging Face's Trainer: trained, saved, resumed and evaluated as everywhere else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    PaCATrainerCallback,
    apply_paca,
    attach,
    load_adapter,
    paca_layers,
    save_adapter,
)
from tests.callbacks.test_paca import in_step
from tests.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate")
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

CONFIG = PaCAConfig(r=4, alpha=8, target_modules=["q_proj", "down_proj"])


def rows(count: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 380, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arguments(path: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 1,
    }
    return TrainingArguments(**(defaults | settings))


def trainer_of(
    path: Path,
    callback: PaCATrainerCallback | None = None,
    model: nn.Module | None = None,
    data: list[dict[str, Tensor]] | None = None,
    **settings: Any,
) -> Trainer:
    given = {name: settings.pop(name) for name in ("optimizers", "model_init", "processing_class") if name in settings}
    if "model_init" not in given:
        given["model"] = tiny_llama(attention_dropout=0.1) if model is None else model
    return Trainer(
        args=arguments(path, **settings),
        train_dataset=data or rows(),
        eval_dataset=data or rows(),
        callbacks=[callback or PaCATrainerCallback(CONFIG)],
        **given,
    )


def deltas(model: Any) -> dict[str, Tensor]:
    return {path: layer.paca_delta.detach().clone() for path, layer in paca_layers(model)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[path], second[path]) for path in first)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


def test_it_trains_as_a_plain_loop_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = rows(1)[0]
    expected = tiny_llama()
    apply_paca(expected, CONFIG)
    optimizer = torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], lr=0.5)
    attach(optimizer, expected)
    for _ in range(3):
        optimizer.zero_grad()
        expected(**{name: torch.stack([tensor, tensor]) for name, tensor in row.items()}).loss.backward()
        optimizer.step()

    trainer = trainer_of(
        tmp_path,
        model=tiny_llama(),
        data=[row] * 8,
        max_steps=3,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=0.5,
        max_grad_norm=0,
    )
    trainer.train()
    assert same(deltas(trainer.model), deltas(expected))
    assert all(delta.any() for delta in deltas(expected).values())
    assert in_step(trainer.model)
    for name, tensor in tiny_llama().state_dict().items():
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            assert torch.equal(trainer.model.state_dict()[name], tensor)
    assert "scaling * lr: 1" in capsys.readouterr().out


def test_resume_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "a", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer_of(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(deltas(resumed.model), deltas(whole.model))
    assert in_step(resumed.model)

    restored = trainer_of(
        tmp_path / "c", PaCATrainerCallback(CONFIG, dirpath=str(tmp_path / "here")),
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    restored.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(deltas(restored.model), deltas(whole.model))


def test_a_checkpoint_is_an_adapter_and_holds_no_frozen_weight(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=6, processing_class=tiny_tokenizer())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    assert {name.rpartition(".")[2] for name in load_file(checkpoint / "model.safetensors")} == {
        "paca_delta",
        "paca_indices",
    }
    for directory in (checkpoint, tmp_path / "adapter"):
        model = tiny_llama()
        load_adapter(model, directory)
        assert torch.equal(logits(model), logits(trainer.model))
        assert (directory / "tokenizer.json").exists()


def test_full_checkpoints_keep_the_base(tmp_path: Path) -> None:
    callback = PaCATrainerCallback(CONFIG, full_checkpoints=True)
    trainer = trainer_of(tmp_path, callback, save_strategy="steps", save_steps=6)
    trainer.train()
    assert set(load_file(tmp_path / "checkpoint-6" / "model.safetensors")) > set(tiny_llama().state_dict())


def test_the_model_saved_after_training_is_whole(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "whole"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(plain), logits(trainer.model))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-1"  # the largest loss, of data that it learns
    model = tiny_llama()
    load_adapter(model, best)
    assert same(deltas(model), deltas(trainer.model))
    assert in_step(trainer.model)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(
        torch.equal(tensor, saved[name]) for name, tensor in load_file(best / "adapter_model.safetensors").items()
    )


def test_it_goes_on_from_an_adapter_or_a_converted_model(tmp_path: Path) -> None:
    first = trainer_of(tmp_path / "a")
    first.train()
    second = trainer_of(tmp_path / "b", PaCATrainerCallback(adapter=str(tmp_path / "a" / "adapter")))
    assert same(deltas(second.model), deltas(first.model))
    assert torch.equal(logits(second.model), logits(first.model))
    second.train()
    assert not same(deltas(second.model), deltas(first.model))

    converted = tiny_llama()
    apply_paca(converted, CONFIG)
    third = trainer_of(tmp_path / "c", PaCATrainerCallback(), model=converted)
    third.train()
    assert set(deltas(third.model)) == set(deltas(first.model))
    assert in_step(third.model)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_it_goes_on_from_columns_that_data_chose(quantize: Any, tmp_path: Path) -> None:
    calibration = [{name: value[None] for name, value in rows(1)[0].items()}]
    config = dataclasses.replace(CONFIG, selection="activation_norm", quantize=quantize)
    model = tiny_llama()
    apply_paca(model, dataclasses.replace(config, column_steps="equal"), calibration=calibration)
    first = trainer_of(tmp_path / "equal", PaCATrainerCallback(), model=model)
    first.train()
    second = trainer_of(tmp_path / "b", PaCATrainerCallback(adapter=str(tmp_path / "equal" / "adapter")))
    assert same(deltas(second.model), deltas(first.model))
    assert torch.equal(logits(second.model), logits(first.model))

    apply_paca(model := tiny_llama(), config, calibration=calibration)
    save_adapter(model, tmp_path / "own")
    with pytest.raises(PaCAError, match="moves by a step that fits its input, which the Trainer's batches do not tell"):
        trainer_of(tmp_path / "c", PaCATrainerCallback(adapter=str(tmp_path / "own")))
    load_adapter(again := tiny_llama(), tmp_path / "own")
    apply_paca(again, config, calibration=calibration)
    third = trainer_of(tmp_path / "d", PaCATrainerCallback(), model=again)
    assert all(
        torch.equal(a.factor, b.factor)
        for (_, a), (_, b) in zip(paca_layers(third.model), paca_layers(model), strict=True)
    )


FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


@pytest.mark.parametrize(
    "settings",
    [
        {CHECKPOINTING: True},
        {"bf16": True},
        {"fp16": True},
        {"bf16_full_eval": True},
        {"fp16_full_eval": True},
        {"gradient_accumulation_steps": 2},
        {"optim": "adafactor"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=2, **settings)
    trainer.train()
    trained = deltas(trainer.model)
    assert all(delta.any() for delta in trained.values())
    assert in_step(trainer.model)
    assert trainer.evaluate()["eval_loss"] > 0  # with full_eval, casts the model
    assert same(deltas(trainer.model), trained)
    assert in_step(trainer.model)


def test_a_schedule_free_optimizer_is_evaluated_with_its_averages(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    seen: list[dict[str, Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any = None, **_: Any) -> None:
            assert in_step(model)
            seen.append(deltas(model))

        def on_evaluate(self, *args: Any, model: Any = None, **_: Any) -> None:
            assert in_step(model)
            seen.append(deltas(model))

    trainer = trainer_of(tmp_path, max_steps=3, optim="schedule_free_adamw", eval_strategy="steps", eval_steps=3)
    trainer.add_callback(Watch())
    trainer.train()
    assert not same(seen[-1], seen[-2])  # of the evaluation and of the step before it


# ---- mistakes


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path / "a", save_strategy="steps", save_steps=3, max_steps=3).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    other_base = trainer_of(tmp_path / "b", model=tiny_llama(seed=1))
    with pytest.raises(PaCAError, match="saved by a run on another base model"):
        other_base.train(resume_from_checkpoint=checkpoint)
    other_alpha = PaCAConfig(r=4, alpha=4, target_modules=["q_proj", "down_proj"])
    with pytest.raises(PaCAError, match=r"with scaling 2 \(alpha / r\), and this run has 1"):
        trainer_of(tmp_path / "c", PaCATrainerCallback(other_alpha)).train(resume_from_checkpoint=checkpoint)
    fewer = PaCAConfig(r=4, alpha=8, target_modules=["q_proj"])
    with pytest.raises(PaCAError, match=r"The checkpoint trains '.*down_proj'"):
        trainer_of(tmp_path / "d", PaCATrainerCallback(fewer)).train(resume_from_checkpoint=checkpoint)


def test_a_model_that_is_not_converted_is_refused(tmp_path: Path) -> None:
    late = Trainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=rows())
    late.add_callback(PaCATrainerCallback(CONFIG))
    with pytest.raises(PaCAError, match="Pass PaCATrainerCallback in callbacks"):
        late.train()
    with pytest.raises(PaCAError, match=r"With model_init, .* call apply_paca in it"):
        trainer_of(tmp_path, model_init=lambda: tiny_llama()).train()

    def converted() -> nn.Module:
        model = tiny_llama()
        apply_paca(model, CONFIG)
        return model

    trainer_of(tmp_path, model_init=converted, max_steps=1).train()


def test_an_optimizer_that_was_built_before_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PaCAError, match="4 of 4 PaCA layers are not in the optimizer"):
        trainer_of(tmp_path, model=model, optimizers=(optimizer, None)).train()


def test_what_cannot_be_honoured_is_refused_before_training(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fsdp = True
    with pytest.raises(PaCAError, match=r"TrainingArguments\(fsdp=\.\.\.\) cannot train PaCA"):
        PaCATrainerCallback(CONFIG).on_init_end(args, None, None, model=tiny_llama())  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(PaCAError, match="cannot be written"):
        trainer_of(tmp_path / "out", PaCATrainerCallback(CONFIG, dirpath=str(tmp_path / "file" / "adapter")))
    with pytest.raises(PaCAError, match="selection='activation_norm' looks at data: pass calibration="):
        trainer_of(tmp_path, PaCATrainerCallback(PaCAConfig(r=4, selection="activation_norm")))
    model = tiny_llama()
    apply_paca(model, CONFIG)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(PaCAError, match="config says r=2"):
        PaCATrainerCallback(PaCAConfig(r=2), adapter=str(tmp_path / "adapter"))


def test_the_state_of_the_callback_is_json(tmp_path: Path) -> None:
    callback = PaCATrainerCallback(CONFIG)
    trainer_of(tmp_path, callback)
    state = json.loads(json.dumps(callback.state()))
    assert set(state["attributes"]["checkpoint"]["scaling"].values()) == {2.0}
    assert PaCATrainerCallback.from_state(state).full_checkpoints is False


def test_norms_have_a_rate_of_their_own_also_when_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, train_norms=True, norms_lr=0.25)

    def trainer(name: str, **settings: Any) -> Trainer:
        return trainer_of(tmp_path / name, PaCATrainerCallback(config), weight_decay=0.1, **settings)

    def rates(trainer: Trainer) -> list[float]:
        return [group["initial_lr"] for group in trainer.optimizer.param_groups]

    whole = trainer("a", save_strategy="steps", save_steps=3)
    whole.train()
    assert rates(whole) == [1e-2, 2.5e-3]  # its optimizer has a group without weight decay
    assert "in fp32, at lr 0.0025 without weight decay" in " ".join(capsys.readouterr().out.split())
    resumed = trainer("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert rates(resumed) == rates(whole)
    assert same(dict(resumed.model.named_parameters()), dict(whole.model.named_parameters()))

    model = tiny_llama()
    apply_paca(model, config)
    one_group = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    refused = trainer("c", model=model, optimizers=(one_group, None))
    with pytest.raises(PaCAError, match=r"AdamW has them beside other parameters\. Build it with a group of just them"):
        refused.train()
