"""Embeddings: parity with the equation, what is learned, resuming, adapters, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from paca_lightning import (
    AdapterCheckpoint,
    PaCAConfig,
    PaCAError,
    PaCAStrategy,
    apply_paca,
    export_merged,
    load_adapter,
    merge,
    write_columns,
)
from paca_lightning.tasks import EmbeddingDataModule, EmbeddingModule
from paca_lightning.tasks.contrastive_loss import info_nce, pooled
from paca_lightning.tasks.data.sampler import BatchOrder
from paca_lightning.tasks.data.text_loader import TextReader
from tests.distributed_launch import launch
from tests.tasks.runs import Metrics, adamw, trainer
from tests.tasks.test_classifier import BERT
from tests.tiny import tiny_model_directory, tiny_tokenizer

WORDS = ["Paris", "London", "fox", "dog", "name", "help", "capital", "answer", "lazy", "brown", "question", "user"]


def rows(negatives: bool = False) -> list[dict[str, str]]:
    made = []
    for number, word in enumerate(WORDS):
        row = {"anchor": f"What is {word}?", "positive": f"It is {word}."}
        made.append(row | ({"negative": f"It is no {WORDS[number - 1]}."} if negatives else {}))
    return made


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(directory: str, tmp_path: Path) -> Any:
    """Builds a data module of 12 rows."""

    def build(negatives: bool = False, **settings: Any) -> EmbeddingDataModule:
        file = written(tmp_path / "rows.jsonl", rows(negatives))
        defaults: dict[str, Any] = {"tokenizer": directory, "train": file, "validation": file, "batch_size": 4}
        return EmbeddingDataModule(**(defaults | settings))

    return build


def fitted(path: Path, module: EmbeddingModule, data: EmbeddingDataModule, **run: Any) -> Any:
    fit = {"ckpt_path": run.pop("ckpt_path", None)}
    built = trainer(path, callbacks=[*run.pop("callbacks", []), PaCAStrategy(PaCAConfig(r=4))], **run)
    built.fit(module, datamodule=data, **fit)
    return built


# ---- the loss


@pytest.mark.parametrize("with_negatives", [False, True])
def test_the_loss_is_the_equation(with_negatives: bool) -> None:
    torch.manual_seed(0)
    a, p, n = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1) for _ in range(3))
    candidates = [*p, *n] if with_negatives else list(p)
    expected = 0.0
    for i in range(5):
        scores = [math.exp(float(a[i] @ c) / 0.1) for c in candidates]
        expected -= math.log(scores[i] / sum(scores))
    total, right, count = info_nce(a, p, n if with_negatives else None, 0.1)
    assert float(total) == pytest.approx(expected, rel=1e-12)
    nearest = [max(range(len(candidates)), key=lambda j: float(a[i] @ candidates[j])) for i in range(5)]
    assert (int(right), int(count)) == (sum(j == i for i, j in enumerate(nearest)), 5)
    assert [float(part) for part in info_nce(a, p, None, 0.1, left_out=True)] == [0, 0, 0]


def test_pooling_leaves_out_the_padding() -> None:
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for pooling, expected in {"mean": hidden[1, :2].mean(0), "last": hidden[1, 1], "cls": hidden[1, 0]}.items():
        vectors = pooled(hidden, mask, pooling)  # type: ignore[arg-type]
        torch.testing.assert_close(vectors[1], F.normalize(expected, dim=0))
        torch.testing.assert_close(pooled(hidden[1:, :2], None, pooling), vectors[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("negatives", [False, True])
def test_three_steps_are_those_of_a_plain_loop(negatives: bool, directory: str, data: Any, tmp_path: Path) -> None:
    module = EmbeddingModule(directory, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    fitted(tmp_path, module, data(negatives), max_steps=3, limit_val_batches=0, precision="64-true")

    model = hf.AutoModel.from_pretrained(directory).double().train()
    apply_paca(model, PaCAConfig(r=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = data(negatives)
    loader.setup("fit")

    def mean(inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[..., None]
        vectors = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return vectors / vectors.norm(dim=1, keepdim=True)

    for batch in loader.train_dataloader():
        candidates = torch.cat([mean(batch[name]) for name in ("positive", "negative") if name in batch])
        F.cross_entropy(mean(batch["anchor"]) @ candidates.T / 0.05, torch.arange(4)).backward()
        optimizer.step()
        write_columns(model)
        optimizer.zero_grad()
    ours = [p for p in module.model.parameters() if p.requires_grad]
    theirs = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# ---- runs


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_it_learns_and_tells_its_metrics(pooling: Any, directory: str, data: Any, tmp_path: Path) -> None:
    seen = Metrics()
    module = EmbeddingModule(directory, pooling=pooling, optimizer=adamw(1e-2))
    given = data(test=str(tmp_path / "rows.jsonl"))
    run = fitted(tmp_path, module, given, max_epochs=8, callbacks=[seen])
    assert seen.rows[-1]["train/loss"] < 0.6 * seen.rows[1]["train/loss"]
    (tested,) = run.test(module, datamodule=given, verbose=False)
    assert tested.keys() == {"test/loss", "test/retrieval"}
    right = total = 0.0
    for vectors, batch in zip(run.predict(module, datamodule=given), given.val_dataloader(), strict=True):
        assert vectors["anchor"].shape == (len(batch["anchor"]["input_ids"]), 64)
        scores = vectors["anchor"] @ vectors["positive"].T
        right += float((scores.argmax(1) == torch.arange(len(scores))).sum())
        total += float(F.cross_entropy(scores / 0.05, torch.arange(len(scores)), reduction="sum"))
    assert tested["test/retrieval"] == pytest.approx(right / 12)
    assert tested["test/loss"] == pytest.approx(total / 12, rel=1e-3)


def test_resuming_is_bitwise(directory: str, data: Any, tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> EmbeddingModule:
        module = EmbeddingModule(directory, optimizer=adamw(1e-2))
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fitted(tmp_path / name, module, data(), callbacks=[saving], enable_checkpointing=True, max_epochs=2, **settings)
        return module

    whole = run("whole", max_steps=5)
    resumed = run("resumed", max_steps=5, ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    for (name, parameter), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_an_encoder_without_its_pooler_is_saved_loaded_merged_and_exported(data: Any, tmp_path: Path) -> None:
    base = tmp_path / "bert"
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    module = EmbeddingModule(str(base), pooling="cls", optimizer=adamw(1e-2))
    given = data(tokenizer=str(base))
    fitted(tmp_path, module, given, callbacks=[AdapterCheckpoint(str(tmp_path / "adapter"))])
    assert module.model.pooler is None
    batch = next(iter(given.val_dataloader()))["anchor"]
    expected = module.eval()(batch).detach()

    fresh = hf.AutoModel.from_pretrained(base, add_pooling_layer=False).eval()
    load_adapter(fresh, tmp_path / "adapter")
    found = fresh(**batch).last_hidden_state[:, 0]
    assert torch.equal(F.normalize(found, dim=-1), expected)
    export_merged(fresh, tmp_path / "merged", given.tokenizer)
    merge(fresh)
    assert torch.equal(fresh(**batch).last_hidden_state[:, 0], found)
    exported = hf.AutoModel.from_pretrained(tmp_path / "merged", dtype=torch.float32, add_pooling_layer=False).eval()
    torch.testing.assert_close(exported(**batch).last_hidden_state[:, 0], found, atol=0.05, rtol=0.05)  # bf16


def fit(directory: Path, file: str, devices: int) -> None:
    """One step on some devices."""
    data = EmbeddingDataModule(str(directory), file, batch_size=3)
    module = EmbeddingModule(str(directory), optimizer=adamw(1e-2))
    run = trainer(
        directory / f"run-{devices}",
        callbacks=[AdapterCheckpoint(str(directory / f"adapter-{devices}")), PaCAStrategy(PaCAConfig(r=4))],
        devices=devices,
        strategy="paca_fsdp2" if devices > 1 else "auto",
        max_steps=1,
    )
    run.fit(module, datamodule=data)


@pytest.mark.distributed
def test_two_sharded_ranks_train_what_the_equation_says_of_each_micro_batch(tmp_path: Path) -> None:
    directory = tiny_model_directory(tmp_path / "tiny")
    file = written(tmp_path / "rows.jsonl", rows()[:6])  # one step of two micro-batches
    launch(fit, 2, directory, file, 2)
    model = hf.AutoModel.from_pretrained(directory).train()
    load_adapter(model, directory / "adapter-2")
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("paca_delta")}

    plain = EmbeddingModule(str(directory))
    plain.configure_model()
    apply_paca(plain.model, PaCAConfig(r=4))
    optimizer = adamw(1e-2)([p for p in plain.parameters() if p.requires_grad])
    for rank in range(2):
        data = EmbeddingDataModule(str(directory), file, batch_size=3)
        data.setup("fit")
        order = BatchOrder(data.splits["train"].lengths, 3, group_by_length=False, rank=rank, world_size=2)
        (batch,) = (TextReader(data.splits["train"], data.pad_token_id, 8, 256).__getitems__(one) for one in order)
        total, count = plain.summed_loss(batch)
        (total / count / 2).backward()
    optimizer.step()
    for name, delta in trained.items():
        torch.testing.assert_close(delta, plain.model.get_parameter(name), atol=1e-5, rtol=1e-3, msg=name)


# ---- mistakes


BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "no positive": ([{"anchor": "x"}], {}, r"row 1: the field 'positive' is missing; the row has 'anchor'"),
    "empty": ([*rows(), {"anchor": " ", "positive": "x"}], {}, r"row 13: the field 'anchor' is empty"),
    "one without": ([*rows(True), rows()[0]], {}, r"row 13: the field 'negative' is missing"),
    "equal": (
        [{"anchor": "a", "positive": "b", "negative": "b"}],
        {},
        r"the fields 'positive' and 'negative' are equal",
    ),
    "alone": (rows(), {"batch_size": 1}, r"without a column of negatives, a row is told from others of its batch"),
    "same": ([rows()[0]] * 3, {}, r"without a column of negatives, a row is told from others of its batch"),
    "columns": (rows(), {"columns": ["anchor"]}, r"columns=\['anchor'\]: name those of anchor and positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_in_the_data_are_named(name: str, directory: str, tmp_path: Path) -> None:
    made, settings, message = BAD[name]
    with pytest.raises(PaCAError, match=message):
        EmbeddingDataModule(directory, written(tmp_path / "bad.jsonl", made), **settings).setup("fit")


def test_columns_of_other_names_and_positives_that_come_twice(directory: str, tmp_path: Path) -> None:
    made = [{"q": row["anchor"], "d": row["positive"]} for row in [*rows(), rows()[0]]]
    data = EmbeddingDataModule(directory, written(tmp_path / "other.jsonl", made), columns=["q", "d"])
    with pytest.warns(UserWarning, match="1 of 13 training rows have the positive of another row"):
        data.setup("fit")
    assert list(next(iter(data.train_dataloader()))) == ["anchor", "positive"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is unknown"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be a positive number"),
        ({"model": "./nowhere"}, "does not exist"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str, directory: str) -> None:
    with pytest.raises(PaCAError, match=message):
        EmbeddingModule(**({"model": directory} | settings)).configure_model()
