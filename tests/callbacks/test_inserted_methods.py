"""BottleneckStrategy and LoReFTStrategy in a run: resumed, saved, loaded, disabled, and refused where they cannot."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning import (
    AdapterCheckpoint,
    BottleneckStrategy,
    LoReFTStrategy,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    load_adapter,
)
from tests.callbacks.test_peft_strategy import IDS, TOKENS, Module, fit, same, trained, trained_with_validation
from tests.layers.test_linear4bit import PATHS, with_linear4bit
from tests.tiny import tiny_llama

METHODS: dict[str, Any] = {
    "houlsby": lambda **more: BottleneckStrategy(4, **more),
    "pfeiffer": lambda **more: BottleneckStrategy(4, placement="pfeiffer", **more),
    "loreft": lambda **more: LoReFTStrategy(2, first=2, last=2, **more),
}
every_method = pytest.mark.parametrize("method", METHODS)


class Answers(Module):
    """Rows of a prompt of 6 tokens and an answer of 6."""

    def train_dataloader(self) -> DataLoader:
        labels = TOKENS.clone()
        labels[:, :6] = -100
        rows = [{"input_ids": ids, "labels": row} for ids, row in zip(TOKENS, labels, strict=True)]
        return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-2)


class Quantized(Module):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = with_linear4bit(tiny_llama(intermediate_size=128).bfloat16(), PATHS)


def test_bottlenecks_on_an_nf4_base_train_after_a_validation_as_without_it(tmp_path: Path) -> None:
    """As QLoRA does: see there."""
    without, after = (
        trained_with_validation(Quantized(), BottleneckStrategy(4), tmp_path, batches) for batches in (0, 1)
    )
    assert same(without, after)


@every_method
def test_fit_resume_and_round_trip(method: str, tmp_path: Path) -> None:
    make, whole = METHODS[method], Answers()
    each = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    strategy = make()
    fit(whole, tmp_path, strategy, each, AdapterCheckpoint(str(tmp_path / "adapter")))
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == trained(whole).keys()
    assert strategy.report.trainable_parameters == sum(p.numel() for p in trained(whole).values())

    resumed = Answers()
    fit(resumed, tmp_path, make(), ckpt_path=tmp_path / "0.ckpt")
    assert same(trained(whole), trained(resumed))

    loaded = Answers()
    fit(loaded, tmp_path, type(strategy)(adapter=str(tmp_path / "adapter")), limit_train_batches=0)
    assert same(trained(whole), trained(loaded))

    whole.eval()
    with torch.no_grad():
        after, base = whole.model(input_ids=IDS).logits, tiny_llama().eval()(input_ids=IDS).logits
        assert not torch.allclose(after, base, atol=1e-3)
        with strategy.disable():
            assert torch.equal(whole.model(input_ids=IDS).logits, base)
        assert torch.equal(whole.model(input_ids=IDS).logits, after)


@every_method
def test_bf16_keeps_the_adapter_in_fp32_and_resumes_bitwise(method: str, tmp_path: Path) -> None:
    each = ModelCheckpoint(tmp_path, filename="{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    whole, resumed = Answers(), Answers()
    fit(whole, tmp_path, METHODS[method](), each, precision="bf16-true")
    assert {p.dtype for p in trained(whole).values()} == {torch.float32}
    assert whole.model.lm_head.weight.dtype == torch.bfloat16
    fit(resumed, tmp_path, METHODS[method](), ckpt_path=tmp_path / "0.ckpt", precision="bf16-true")
    assert same(trained(whole), trained(resumed))


def test_an_adapter_that_was_changed_or_is_of_another_method_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    fit(Answers(), tmp_path, METHODS["houlsby"](), AdapterCheckpoint(str(directory)), max_steps=1)
    with pytest.raises(PaCAError, match="adapter of 'bottleneck adapters', not of 'LoReFT'"):
        LoReFTStrategy(adapter=str(directory))
    with pytest.raises(PaCAError, match="'bottleneck adapters'"):
        load_adapter(tiny_llama(), directory)
    (directory / "base_samples.json").rename(tmp_path / "base_samples.json")  # which would say: another base model
    with pytest.raises(PaCAError, match=r"'model.layers.2.mlp.bottleneck.*' is not in the adapter"):
        fit(Answers(num_hidden_layers=3), tmp_path, BottleneckStrategy(adapter=str(directory)))
    weights = directory / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PaCAError, match="is not what was saved"):
        fit(Answers(), tmp_path, BottleneckStrategy(adapter=str(directory)))
    config = json.loads((directory / "adapter_config.json").read_text())
    config["settings"]["width"] = 3
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PaCAError, match=r"adapter_config.json is damaged: its settings are"):
        BottleneckStrategy(adapter=str(directory))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit(Answers(), tmp_path, METHODS["houlsby"](), ModelCheckpoint(tmp_path, filename="last"), max_steps=1)
    with pytest.raises(PaCAError, match=r"The checkpoint was trained with .*size=4 \(here 8\)"):
        fit(Answers(), tmp_path, BottleneckStrategy(8), ckpt_path=tmp_path / "last.ckpt")


@every_method
def test_sharding_and_a_second_method_are_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"(Bottleneck|LoReFT)Strategy does not shard a model: FSDP2Strategy"):
        fit(Answers(), tmp_path, METHODS[method](), strategy="paca_fsdp2")
    with pytest.raises(PaCAError, match="and PaCAStrategy in one run"):
        fit(Answers(), tmp_path, METHODS[method](), PaCAStrategy(PaCAConfig(r=2)))


class Packed(Answers):
    def train_dataloader(self) -> DataLoader:
        rows = [row | {"position_ids": torch.arange(12)} for row in super().train_dataloader().dataset]
        return DataLoader(rows, batch_size=4)


class WholeRows(Answers):
    def train_dataloader(self) -> DataLoader:
        rows = [row | {"labels": row["input_ids"]} for row in super().train_dataloader().dataset]
        return DataLoader(rows, batch_size=4)


class OtherRows(Answers):
    def train_dataloader(self) -> DataLoader:
        return super().train_dataloader()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step({name: rows[:, :8] for name, rows in batch.items()}, batch_idx)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Module, "a dictionary with input_ids and labels .* This one is Tensor"),
        (Packed, "set packing: false"),
        (WholeRows, "no row of the first batch has one"),
        (OtherRows, r"the model is trained on rows \(4, 8\), which are not those of the batch"),
    ],
)
def test_loreft_refuses_rows_without_a_known_prompt(module: type[Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=message):
        fit(module(), tmp_path, METHODS["loreft"]())


def test_evaluation_in_other_callbacks_edits_the_prompt_of_their_rows(tmp_path: Path) -> None:
    """A forward of the batch is edited at its prompts, also from another callback; any other row is a prompt."""
    seen: list[list[int]] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, idx: int) -> None:
            positions = pl_module._paca_adapted_model.positions
            for rows in (batch["input_ids"], batch["input_ids"].clone(), TOKENS[20:24]):
                with torch.no_grad():
                    pl_module.model(input_ids=rows)
                seen.append(positions.current.index[0].tolist())

    fit(Answers(), tmp_path, METHODS["loreft"](), Looks(), max_steps=1)
    assert seen == [[0, 1, 4, 5], [0, 1, 4, 5], [0, 1, 10, 11]]
