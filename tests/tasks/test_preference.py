"""PreferenceModule in runs: gradients, steps and resuming against plain loops, the reference, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from paca_lightning import (
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    PEFTStrategy,
    apply_paca,
    attach,
    disable_paca,
    paca_layers,
    save_adapter,
)
from paca_lightning.tasks import CausalLMModule, PreferenceDataModule, PreferenceModule
from tests.tasks.preferences import labelled, pairs
from tests.tasks.rows import write_rows
from tests.tasks.runs import Metrics, adamw, trainer
from tests.tasks.test_preference_losses import rows_of

CONFIG = PaCAConfig(r=4)


@pytest.fixture
def data(directory: str, tmp_path: Path) -> Any:
    """Builds a data module of ten pairs, or ten rows with labels."""

    def build(loss: str = "dpo", count: int = 10, **settings: Any) -> PreferenceDataModule:
        rows = labelled(count) if loss == "kto" else pairs(count)
        path = str(write_rows(tmp_path / f"{loss == 'kto'}{count}.jsonl", rows))
        defaults = {"batch_size": 3, "cache_dir": str(tmp_path / "cache")}
        return PreferenceDataModule(directory, path, **(defaults | settings))

    return build


def fit(tmp_path: Path, module: LightningModule, data: Any, *callbacks: Any, **settings: Any) -> Trainer:
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(tmp_path, callbacks=list(callbacks), logger=False, **settings)
    run.fit(module, data, ckpt_path=ckpt_path)
    return run


def deltas(module: Any) -> list[Tensor]:
    return [layer.paca_delta.detach().clone() for _, layer in paca_layers(module)]


def plain_dpo(model: Any, reference: Any, batch: dict[str, Tensor], beta: float = 0.1) -> Tensor:
    """DPO from full logits and a second model."""
    count = len(batch["rows"])
    batch = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    with torch.no_grad():
        base = rows_of(reference, batch)
    ratios = rows_of(model, batch) - base
    return -F.logsigmoid(beta * (ratios[:count] - ratios[count:])).mean()


def test_gradients_and_three_steps_are_those_of_a_plain_loop(directory: str, data: Any, tmp_path: Path) -> None:
    class Gradients(Metrics):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # type: ignore[no-untyped-def]
            self.rows.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    module, gradients = PreferenceModule(directory, optimizer=adamw(1e-2)), Gradients()
    fit(tmp_path, module, rows := data(), gradients, PaCAStrategy(CONFIG), max_steps=3)

    model = AutoModelForCausalLM.from_pretrained(directory).train()
    reference = copy.deepcopy(model)
    apply_paca(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(optimizer, model)
    batches = list(rows.train_dataloader())[:3]
    seen = [row for row in gradients.rows if any(isinstance(value, Tensor) for value in row.values())]
    for batch, found in zip(batches, seen, strict=True):
        plain_dpo(model, reference, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[f"model.{name}"], parameter.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(deltas(module), deltas(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo", "kto"])
def test_each_loss_learns_and_logs_its_rewards(loss: Any, directory: str, data: Any, tmp_path: Path) -> None:
    rows = data(loss)
    rows.hparams["validation"] = rows.hparams["train"]
    module = PreferenceModule(directory, loss=loss, optimizer=adamw(1e-2))
    run = fit(tmp_path, module, rows, PaCAStrategy(CONFIG), max_epochs=4)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    for split in ("train", "val"):
        names = {"loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))}
        assert {f"{split}/{name}" for name in names} <= logged.keys()
    assert "train/perplexity" not in logged
    assert logged["val/rewards/accuracies"] == 1
    margin = logged["val/rewards/chosen"] - logged["val/rewards/rejected"]
    assert logged["val/rewards/margins"] == pytest.approx(margin, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_cached_reference_trains_the_same(loss: Any, directory: str, data: Any, tmp_path: Path) -> None:
    found = []
    for cached in (False, True):
        module = PreferenceModule(directory, loss=loss, cache_reference=cached, optimizer=adamw(1e-2))
        fit(tmp_path, module, data(loss), PaCAStrategy(CONFIG), max_epochs=2)
        found.append(deltas(module))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("loss", "cached"), [("dpo", False), ("dpo", True), ("kto", False)])
def test_resuming_within_an_epoch_is_bitwise(
    loss: Any, cached: bool, directory: str, data: Any, tmp_path: Path
) -> None:
    def module() -> PreferenceModule:
        return PreferenceModule(directory, loss=loss, cache_reference=cached, optimizer=adamw(1e-2))

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, whole := module(), data(loss), PaCAStrategy(CONFIG), saving, max_steps=6, enable_checkpointing=True)
    resumed = module()
    fit(tmp_path, resumed, data(loss), PaCAStrategy(CONFIG), max_steps=6, ckpt_path=str(tmp_path / "step=2.ckpt"))
    for one, other in zip(deltas(whole), deltas(resumed), strict=True):
        assert torch.equal(one, other)


def test_values_of_other_data_are_computed_again_or_refused(directory: str, data: Any, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "last")
    module = PreferenceModule(directory, cache_reference=True, optimizer=adamw(1e-3))
    fit(tmp_path, module, data(), saving, max_epochs=1, enable_checkpointing=True)  # full weights
    settings = {"max_epochs": 2, "ckpt_path": str(tmp_path / "last.ckpt")}
    again = PreferenceModule(directory, cache_reference=True, optimizer=adamw(1e-3))
    fit(tmp_path, again, data(), **settings)
    with pytest.raises(PaCAError, match="belong to other train data"):
        fit(tmp_path, PreferenceModule(directory, cache_reference=True), data(count=11), **settings)
    fit(tmp_path, PreferenceModule(directory, cache_reference=True), data(), PaCAStrategy(CONFIG))


def test_full_fine_tuning_with_a_cached_reference_is_that_of_a_second_model(
    directory: str, data: Any, tmp_path: Path
) -> None:
    module = PreferenceModule(directory, cache_reference=True, optimizer=adamw(1e-3))
    fit(tmp_path, module, rows := data(), max_steps=2)
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    reference, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in list(rows.train_dataloader())[:2]:
        plain_dpo(model, reference, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(module.model.parameters(), model.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def test_full_fine_tuning_is_validated_against_its_cached_reference(directory: str, data: Any, tmp_path: Path) -> None:
    rows = data()
    rows.hparams["validation"] = rows.hparams["train"]
    saving, settings = ModelCheckpoint(tmp_path, "last"), {"enable_checkpointing": True, "num_sanity_val_steps": 2}
    module = PreferenceModule(directory, cache_reference=True, optimizer=adamw(1e-3))
    run = fit(tmp_path, module, rows, saving, max_epochs=2, **settings)
    expected = run.callback_metrics["val/loss"].item()
    assert expected < 0.6
    again, validating = PreferenceModule(directory, cache_reference=True), trainer(tmp_path, logger=False)
    (found,) = validating.validate(again, rows, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert found["val/loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(PaCAError, match="The model before training is gone"):
        validating.validate(PreferenceModule(directory, cache_reference=True), rows, verbose=False)


def test_the_reference_under_peft_is_the_base_model(directory: str, data: Any, tmp_path: Path) -> None:
    module = PreferenceModule(directory, optimizer=adamw(1e-2))
    strategy = PEFTStrategy(LoraConfig(r=4, target_modules="all-linear"))
    run = fit(tmp_path, module, rows := data(), strategy, max_epochs=4)
    assert run.callback_metrics["train/rewards/margins"] > 0
    base = AutoModelForCausalLM.from_pretrained(directory)
    batch = next(iter(rows.train_dataloader()))
    with module.reference.active(module):
        found, _ = module.log_probs(batch)
    expected = rows_of(base, {"attention_mask": torch.ones_like(batch["input_ids"]), **batch})
    torch.testing.assert_close(found, expected)
    assert module.training
    trained, _ = module.log_probs(batch)
    assert (trained - expected).abs().max() > 0.1


def test_without_a_trainer_the_context_is_given(directory: str, data: Any) -> None:
    module = PreferenceModule(directory)
    module.configure_model()
    apply_paca(module, CONFIG)
    module.reference.context = lambda: disable_paca(module)
    (rows := data()).setup("fit")
    loss = module.training_step(next(iter(rows.train_dataloader())), 0)
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)


def test_a_run_from_an_adapter_says_that_the_reference_is_the_base(directory: str, data: Any, tmp_path: Path) -> None:
    module = PreferenceModule(directory, loss="simpo")
    fit(tmp_path, module, data(), PaCAStrategy(CONFIG))
    save_adapter(module, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="without the adapter .* from which the run starts"):
        fit(tmp_path, PreferenceModule(directory), data(), PaCAStrategy(adapter=str(tmp_path / "adapter")), max_steps=1)


def test_what_cannot_be_done_is_refused_before_training(directory: str, data: Any, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"nothing keeps it: all weights are trained\..* simpo or orpo"):
        fit(tmp_path, PreferenceModule(directory), data())
    with pytest.raises(PaCAError, match="has pairs, for loss: dpo, ipo, simpo or orpo, not for loss: kto"):
        fit(tmp_path, PreferenceModule(directory, loss="kto"), data(), PaCAStrategy(CONFIG))
    with pytest.raises(PaCAError, match="has rows with a label, for loss: kto, not for loss: dpo"):
        fit(tmp_path, PreferenceModule(directory), data("kto"), PaCAStrategy(CONFIG))
    with pytest.raises(PaCAError, match="loss: orpo has no reference: leave out cache_reference"):
        PreferenceModule(directory, loss="orpo", cache_reference=True)
    with pytest.raises(PaCAError, match="no model is converted yet"):
        PaCAStrategy().disable()
    pissa = PEFTStrategy(LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"))
    with pytest.raises(PaCAError, match="cannot give the base model back"):
        fit(tmp_path, PreferenceModule(directory), data(), pissa)
    with pytest.raises(PaCAError, match="takes batches of PreferenceDataModule"):
        PreferenceModule(directory).summed_loss({"input_ids": torch.ones(2, 4, dtype=torch.int64)})
    with pytest.raises(PaCAError, match="CausalLMModule would learn the bad answers"):
        fit(tmp_path, CausalLMModule(directory), data(), PaCAStrategy(CONFIG))
