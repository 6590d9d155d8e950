"""Heads over labels: parity with a plain loop, resuming, adapters, exports, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from paca_lightning import (
    AdapterCheckpoint,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    PEFTStrategy,
    apply_paca,
    export_merged,
    load_adapter,
    merge,
    paca_layers,
    save_adapter,
    write_columns,
)
from paca_lightning.tasks import ClassificationDataModule, ClassifierModule
from paca_lightning.tasks.head_loss import head_loss
from paca_lightning.tasks.new_heads import HeadTask
from tests.tasks.runs import Metrics, adamw, trainer
from tests.tiny import tiny_model_directory, tiny_tokenizer

BERT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 384,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 2,
}  # fmt: skip
CAPITALS = ["Paris", "London", "Rome", "Oslo"]
ANIMALS = ["the dog", "the fox", "a lazy dog", "a quick fox"]


def rows_of(task: HeadTask, count: int = 12) -> list[dict[str, Any]]:
    """Texts about capitals and animals, in turn."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        animal = number % 2
        text = f"{'What is' if number % 3 else 'I saw'} {(ANIMALS if animal else CAPITALS)[number // 2 % 4]}?"
        words = text.split()
        label: dict[str, Any] = {
            "sequence": {"label": "animal" if animal else "place"},
            "multi_label": {"labels": ["animal"] if animal else [["place"], ["place", "capital"]][number // 2 % 2]},
            "regression": {"label": 2.0 * animal - 1 + number / 50},
            "tokens": {"ner_tags": ["O"] * (len(words) - 1) + ["ANIMAL" if animal else "PLACE"]},
        }[task]
        rows.append(({"tokens": words} if task == "tokens" else {"text": text}) | label)
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama, whose head for words has no dropout."""
    return str(tiny_model_directory(tmp_path_factory.mktemp("tiny") / "model", classifier_dropout=0.0))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT without a head, and without the pooler that classifiers add."""
    path = tmp_path_factory.mktemp("bert")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def data(directory: str, tmp_path: Path) -> Any:
    """Builds a data module."""

    def build(task: HeadTask = "sequence", **settings: Any) -> ClassificationDataModule:
        file = written(tmp_path / f"{task}.jsonl", rows_of(task))
        defaults: dict[str, Any] = {"tokenizer": directory, "train": file, "validation": file, "batch_size": 4}
        return ClassificationDataModule(task=task, **(defaults | settings))

    return build


def fitted(
    path: Path, module: ClassifierModule, data: ClassificationDataModule, config: PaCAConfig | None = None, **run: Any
) -> Trainer:
    fit = {"ckpt_path": run.pop("ckpt_path", None)}
    callbacks = [*run.pop("callbacks", []), PaCAStrategy(config or PaCAConfig(r=4))]
    built = trainer(path, callbacks=callbacks, **run)
    built.fit(module, datamodule=data, **fit)
    return built


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits


def a_batch(data: ClassificationDataModule) -> dict[str, Tensor]:
    return next(iter(data.val_dataloader()))


# ---- training


@pytest.mark.parametrize("task", ["sequence", "tokens"])
def test_three_steps_are_those_of_a_plain_loop(task: HeadTask, directory: str, data: Any, tmp_path: Path) -> None:
    given = data(task)
    module = ClassifierModule(directory, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    fitted(tmp_path, module, given, max_steps=3, limit_val_batches=0)

    auto = hf.AutoModelForTokenClassification if task == "tokens" else hf.AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_pretrained(directory, num_labels=len(given.labels)).train()
    apply_paca(model, PaCAConfig(r=4, modules_to_save=["score"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = data(task)
    loader.setup("fit")
    for batch in loader.train_dataloader():
        model(**batch).loss.backward()
        optimizer.step()
        write_columns(model)
        optimizer.zero_grad()
    ours = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert "score.weight" in ours
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("task", ["sequence", "tokens", "multi_label", "regression"])
def test_the_loss_is_that_of_transformers(task: HeadTask, directory: str, data: Any) -> None:
    given = data(task)
    given.setup("fit")
    module = ClassifierModule(directory, task=task, labels=given.labels)
    module.configure_model()
    batch = a_batch(given)
    total, items = module.summed_loss(batch)
    torch.testing.assert_close(total / items, module.model(**batch).loss)
    assert int(items) == (int((batch["labels"] != -100).sum()) if task == "tokens" else 4)


def test_what_repeats_another_ranks_row_has_no_loss() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    for task, labels in (("sequence", torch.full((3,), -100)), ("multi_label", torch.full((3, 2), torch.nan))):
        total, items = head_loss(task, logits, labels)  # type: ignore[arg-type]
        assert (float(total.detach()), int(items)) == (0, 0)
        (gradient,) = torch.autograd.grad(total, logits)
        assert not gradient.any()


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("sequence", {"val/accuracy", "val/f1"}),
        ("tokens", {"val/accuracy", "val/f1"}),
        ("multi_label", {"val/accuracy", "val/f1"}),
        ("regression", {"val/mse", "val/pearson"}),
    ],
)
def test_each_task_learns_and_tells_its_metrics(
    task: HeadTask, metrics: set[str], directory: str, data: Any, tmp_path: Path
) -> None:
    seen = Metrics()
    module = ClassifierModule(directory, optimizer=adamw(1e-2))
    given = data(task, test=str(tmp_path / f"{task}.jsonl"))
    run = fitted(tmp_path, module, given, max_epochs=6, callbacks=[seen])
    assert seen.rows[-1]["train/loss"] < 0.6 * seen.rows[1]["train/loss"]
    assert metrics | {"val/loss"} <= run.callback_metrics.keys()
    with torch.no_grad():
        batches = [(module.eval()(batch), batch["labels"]) for batch in given.val_dataloader()]
    if task == "sequence":
        right = torch.cat([logits.argmax(-1) == labels for logits, labels in batches])
        assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(float(right.float().mean()))
    if task == "regression":
        logits, labels = (torch.cat(parts).flatten() for parts in zip(*batches, strict=True))
        assert float(run.callback_metrics["val/mse"]) == pytest.approx(float(F.mse_loss(logits, labels)), rel=1e-4)
        correlation = torch.corrcoef(torch.stack([logits, labels]))[0, 1]
        assert float(run.callback_metrics["val/pearson"]) == pytest.approx(float(correlation), abs=1e-4)
    (tested,) = run.test(module, datamodule=given, verbose=False)
    assert tested.keys() == {name.replace("val/", "test/") for name in metrics | {"val/loss"}}
    predicted = run.predict(module, datamodule=given)
    assert predicted is not None
    assert len(predicted) == 3
    assert predicted[0]["prediction"].shape == batches[0][1].shape


@pytest.mark.slow
def test_it_beats_the_majority_class_on_shipped_data(tmp_path: Path) -> None:
    """With a random model: what it learns is the words themselves."""
    folder = Path(__file__).parents[2] / "configs" / "data" / "requests"
    tiny = tiny_model_directory(tmp_path / "tiny")
    data = ClassificationDataModule(
        str(tiny), str(folder / "train.jsonl"), str(folder / "validation.jsonl"), max_length=64, batch_size=16
    )
    module = ClassifierModule(str(tiny), optimizer=adamw(3e-3))
    run = fitted(tmp_path, module, data, PaCAConfig(r=16), max_epochs=6)
    labels = torch.from_numpy(data.splits["validation"].labels)  # type: ignore[arg-type]
    majority = float(labels.bincount().max()) / len(labels)
    assert run.callback_metrics["val/accuracy"] > majority + 0.1


def test_resuming_is_bitwise(directory: str, data: Any, tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> ClassifierModule:
        module = ClassifierModule(directory, optimizer=adamw(1e-2))
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fitted(tmp_path / name, module, data(), callbacks=[saving], enable_checkpointing=True, **settings)
        return module

    whole = run("whole", max_steps=5, max_epochs=2)
    resumed = run("resumed", max_steps=5, max_epochs=2, ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    for (name, parameter), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    saved = torch.load(tmp_path / "whole" / "step=2.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["labels"] == ["animal", "place"]
    assert any(name.endswith("score.weight") for name in saved["state_dict"])


# ---- heads


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_new_head_is_trained_whole_saved_loaded_merged_and_exported(
    kind: str, directory: str, bert: str, data: Any, tmp_path: Path
) -> None:
    base = bert if kind == "encoder" else directory
    given = data(tokenizer=base)
    module = ClassifierModule(base, optimizer=adamw(1e-2))
    fitted(tmp_path, module, given, callbacks=[AdapterCheckpoint(str(tmp_path / "adapter"))])
    batch = a_batch(given)
    expected = logits_of(module.model, batch)

    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    new = ["score"] if kind == "decoder" else ["classifier", "bert.pooler.dense"]
    assert settings["modules_to_save"] == new
    fresh = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=2)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits_of(fresh, batch), expected)
    assert fresh.config.id2label == {0: "animal", 1: "place"}  # it had none of its own
    assert fresh.config.label2id == {"animal": 0, "place": 1}
    names = {0: "place", 1: "animal"}
    other = hf.AutoModelForSequenceClassification.from_pretrained(base, id2label=names, pad_token_id=2)
    with pytest.raises(PaCAError, match=r"labels \['animal', 'place'\], in this order, .* has \['place', 'animal'\]"):
        load_adapter(other, tmp_path / "adapter")
    assert not list(paca_layers(other))
    assert other.config.id2label == names

    # A run that begins with the adapter: its settings need not repeat the head.
    again = ClassifierModule(base)
    run = trainer(tmp_path, callbacks=[PaCAStrategy(PaCAConfig(r=4), adapter=str(tmp_path / "adapter"))])
    run.validate(again, datamodule=given, verbose=False)
    assert torch.equal(logits_of(again.model, batch), expected)

    export_merged(fresh, tmp_path / "merged", given.tokenizer)
    merge(fresh)
    assert torch.equal(logits_of(fresh, batch), expected)
    exported = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(exported, batch), expected, atol=0.05, rtol=0.05)  # bf16

    export_merged(module, tmp_path / "named", given.tokenizer)
    classify = hf.pipeline("text-classification", str(tmp_path / "named"), device="cpu")
    assert set(classify.model.config.id2label.values()) == {"animal", "place"}
    assert classify("I saw the dog?")[0]["label"] in ("animal", "place")


def test_peft_trains_a_new_head_by_itself_and_an_adapter_brings_it_back(
    directory: str, data: Any, tmp_path: Path
) -> None:
    module, given = ClassifierModule(directory, optimizer=adamw(1e-2)), data()
    strategy = PEFTStrategy(LoraConfig(r=4, target_modules=["q_proj"]))
    trainer(tmp_path, callbacks=[strategy, AdapterCheckpoint(str(tmp_path / "lora"))]).fit(module, datamodule=given)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert any(name.startswith("score.") for name in trained)
    batch = a_batch(given)
    again = ClassifierModule(directory, head_seed=1)
    run = trainer(tmp_path, callbacks=[PEFTStrategy(adapter=str(tmp_path / "lora"))])
    run.validate(again, datamodule=given, verbose=False)
    torch.testing.assert_close(logits_of(again.model, batch), logits_of(module.model, batch), rtol=0, atol=0)


def test_heads_are_equal_whatever_the_global_random_state_is(directory: str) -> None:
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = ClassifierModule(directory, labels=3)
        module.configure_model()
        heads.append(module.model.score.weight)
    assert torch.equal(*heads)
    other = ClassifierModule(directory, labels=3, head_seed=1)
    other.configure_model()
    assert not torch.equal(other.model.score.weight, heads[0])


def test_new_modules_are_trained_whole_without_being_named(directory: str) -> None:
    module = ClassifierModule(directory, labels=3)
    module.configure_model()
    report = apply_paca(module, PaCAConfig(r=4))
    assert report.saved == ["model.score"]
    assert module.model.score.weight.requires_grad
    apply_paca(module, PaCAConfig(r=4))  # the same settings again
    excluded = ClassifierModule(directory, labels=3)
    excluded.configure_model()
    assert not apply_paca(excluded, PaCAConfig(r=4, exclude_modules=["score"])).saved
    with pytest.raises(PaCAError, match=r"The new head 'score' is frozen, so it would stay random\."):
        excluded.configure_optimizers()


@pytest.mark.parametrize("settings", [{"activation_checkpointing": True}, {"dtype": "bfloat16"}])
def test_settings_of_the_module(settings: dict[str, Any], directory: str, data: Any, tmp_path: Path) -> None:
    module = ClassifierModule(directory, optimizer=adamw(1e-2), **settings)
    fitted(tmp_path, module, data(), max_steps=2)
    assert all(layer.paca_delta.any() for _, layer in paca_layers(module))


# ---- mistakes


def test_what_contradicts_the_data_is_refused(directory: str, data: Any, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"The module's task is 'tokens' and that of the data 'sequence'"):
        fitted(tmp_path, ClassifierModule(directory, task="tokens"), data())
    with pytest.raises(
        PaCAError, match=r"The module's labels is \['a', 'b'\] and that of the data \['animal', 'place'"
    ):
        fitted(tmp_path, ClassifierModule(directory, labels=["a", "b"]), data())
    with pytest.raises(PaCAError, match=r"The labels of the sequence task are unknown"):
        ClassifierModule(directory).configure_model()
    with pytest.raises(PaCAError, match="there must be at least two"):
        ClassifierModule(directory, labels=["one"])
    other = ClassifierModule(directory, labels=3)
    loader = [{"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 3])}]
    with pytest.raises(PaCAError, match=r"A batch has the label 3, and the head has 3 labels, from 0 to 2"):
        trainer(tmp_path).fit(other, DataLoader(loader, batch_size=None))


def test_a_head_of_the_files_is_taken_or_refused(directory: str, data: Any, tmp_path: Path) -> None:
    module = ClassifierModule(directory, labels=["place", "animal"])
    module.configure_model()
    module.model.save_pretrained(tmp_path / "trained")
    tiny_tokenizer().save_pretrained(tmp_path / "trained")
    again = ClassifierModule(str(tmp_path / "trained"))
    again.configure_model()
    assert again.labels == ["place", "animal"]
    assert torch.equal(again.model.score.weight, module.model.score.weight)
    with pytest.raises(
        PaCAError, match=r"knows the labels 'place', 'animal', in this order, and the data have 'animal'"
    ):
        fitted(tmp_path, ClassifierModule(str(tmp_path / "trained")), data())
    fitted(tmp_path, ClassifierModule(str(tmp_path / "trained")), data(labels=["place", "animal"]), max_steps=1)
    with pytest.raises(PaCAError, match=r"has 2 labels \('place', 'animal'\), and 3 are asked for \('0', '1', '2'\)"):
        ClassifierModule(str(tmp_path / "trained"), labels=3).configure_model()


def test_a_model_without_such_a_head_or_without_weights_is_refused(directory: str, tmp_path: Path) -> None:
    hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4).save_pretrained(tmp_path / "mamba")
    with pytest.raises(PaCAError, match="transformers has no such head for it"):
        ClassifierModule(str(tmp_path / "mamba"), labels=2, pretrained=False).configure_model()
    short = tiny_model_directory(tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"num_hidden_layers": 3}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(PaCAError, match="lack more than a head"):
        ClassifierModule(str(short), labels=2).configure_model()


def test_a_decoder_needs_to_know_the_padding(tmp_path: Path) -> None:
    tiny = tiny_model_directory(tmp_path / "tiny", pad_token_id=None)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1])}
    with pytest.raises(PaCAError, match="has no pad_token_id, by which it finds the last token"):
        trainer(tmp_path).fit(ClassifierModule(str(tiny), labels=2), DataLoader([batch], batch_size=None))


def test_the_adapter_directory_loads_in_another_module(directory: str, data: Any, tmp_path: Path) -> None:
    module = ClassifierModule(directory, labels=3)
    module.configure_model()
    apply_paca(module, PaCAConfig(r=4))
    save_adapter(module, tmp_path / "adapter")
    two = hf.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
    with pytest.raises(PaCAError, match=r"'score\.weight' has shape \(3, 64\), the model needs \(2, 64\)"):
        load_adapter(two, tmp_path / "adapter")
