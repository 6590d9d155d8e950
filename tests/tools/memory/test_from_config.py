"""Runs to trace, from LightningCLI configs."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from transformers import LlamaForSequenceClassification

from paca_lightning import PaCAError, PaCAStrategy, apply_paca
from paca_lightning.core.new_modules import declare_new
from paca_lightning.strategies.hpu import HPUDDPStrategy, HPUFSDP2Strategy, SingleHPUStrategy
from paca_lightning.tasks import CausalLMModule, ClassifierModule, EmbeddingDataModule, EmbeddingModule
from paca_lightning.tools.memory.from_config import known_strategy, read_config, run_to_trace
from paca_lightning.tools.memory.traced_model import TracedModel
from tests.tiny import tiny_config, tiny_llama
from tests.tools.memory.runs import DEBUG

ROOT = Path(__file__).parents[3]

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_each_config_is_estimated(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine, whatever devices it is for."""
    monkeypatch.chdir(ROOT)
    tiny_config().save_pretrained(tmp_path)
    described = read_config(["--config", config, "--model.init_args.model", str(tmp_path)])
    run, paca = run_to_trace(*described, tokens=64, batch=1)
    assert (run.strategy is not None) == ("fsdp2" in config or "70b" in config)
    assert paca is not None
    model = LlamaForSequenceClassification(tiny_config()) if "classify" in config else tiny_llama()
    if "classify" in config:
        declare_new(model, ["score"])
    trained = apply_paca(model, paca).trainable_parameters
    assert TracedModel(run).step().trainable_parameters == trained


@pytest.mark.parametrize(
    ("strategy", "sharded", "copied"),
    [
        ("auto", False, True),
        ("ddp", False, True),
        ("ddp_spawn_find_unused_parameters_false", False, True),
        (DDPStrategy(static_graph=True), False, True),
        ("hpu_single", False, True),
        (SingleHPUStrategy(), False, True),
        ("hpu_ddp", False, True),
        (HPUDDPStrategy(), False, True),
        ("paca_fsdp2", True, False),
        ("hpu_fsdp2", True, False),
        (HPUFSDP2Strategy(), True, False),
    ],
)
def test_strategies_are_known_by_name_and_as_objects(strategy: Any, sharded: bool, copied: bool) -> None:
    found, gradients_copied = known_strategy(strategy, ranks=2)
    assert (found is not None, gradients_copied) == (sharded, copied)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "xla", "single_tpu", "dpp", FSDPStrategy()])
def test_other_strategies_are_refused(strategy: Any) -> None:
    with pytest.raises(PaCAError, match=r"is not estimated\. Use auto, ddp, paca_fsdp2 or paca_diloco"):
        known_strategy(strategy, ranks=2)


class Inheriting(CausalLMModule):
    """A user's module, which builds its model as ours does."""


class Eager(LightningModule):
    """A user's module, which builds its model at once."""


def test_a_module_may_inherit_how_it_builds_its_model(model_directory: str) -> None:
    _, datamodule, trainer = read_config(DEBUG)
    inheriting, ours = (
        TracedModel(run_to_trace(kind(model_directory, pretrained=False), datamodule, trainer, tokens=64, batch=1)[0])
        for kind in (Inheriting, CausalLMModule)
    )
    assert inheriting.step().peak == ours.step().peak
    with pytest.raises(PaCAError, match="Eager does not build its model in configure_model"):
        run_to_trace(Eager(), datamodule, trainer)


@pytest.mark.parametrize("task", ["tokens", "multi_label", "regression"])
def test_other_heads_are_estimated(task: Any, model_directory: str) -> None:
    config = ["--config", str(ROOT / "configs" / "classify-smollm2.yaml"), "--data.init_args.task", task]
    _, datamodule, trainer = read_config([*config, "--model.init_args.model", model_directory])
    module = ClassifierModule(model_directory, pretrained=False, task=task)
    run, _ = run_to_trace(module, datamodule, trainer, tokens=64, batch=2)
    assert TracedModel(run).step().peak > 0


@pytest.mark.parametrize("columns", [None, ["a", "b"], ["a", "b", "c"]])
def test_embeddings_have_two_texts_in_a_row_or_three(columns: list[str] | None, model_directory: str) -> None:
    _, _, trainer = read_config(DEBUG)
    trainer.callbacks = [PaCAStrategy()]
    datamodule = EmbeddingDataModule(model_directory, train="rows.jsonl", columns=columns, max_length=64, batch_size=2)
    module = EmbeddingModule(model_directory, pretrained=False)
    with nullcontext() if columns else pytest.warns(UserWarning, match="estimated with an anchor and a positive"):
        run, _ = run_to_trace(module, datamodule, trainer)
    assert (run.texts, run.tokens, run.batch_size) == (len(columns or "ab"), 64, 2)
    assert TracedModel(run).step().peak > 0
