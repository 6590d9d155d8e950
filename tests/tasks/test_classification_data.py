"""Texts with labels: what is read, how it is tokenized, and what is refused with file and row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from paca_lightning import PaCAError
from paca_lightning.tasks import ClassificationDataModule
from paca_lightning.tasks.data.label_names import found_names

ROWS = [{"text": "A dog sleeps.", "label": "dog"}, {"text": "A fox jumps over it.", "label": "fox"}] * 2


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def module(tokenizer_directory: str, tmp_path: Path) -> Any:
    """Builds and sets up a data module from rows."""

    def build(rows: list[dict[str, Any]] | str, **settings: Any) -> ClassificationDataModule:
        train = rows if isinstance(rows, str) else written(tmp_path / "train.jsonl", rows)
        data = ClassificationDataModule(tokenizer_directory, train, **settings)
        data.setup("fit")
        return data

    return build


def test_formats_of_files_give_the_same_rows(module: Any, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"rows.{name}") for name in ("json", "csv", "tsv", "parquet")}
    Path(files["json"]).write_text(json.dumps(ROWS))
    frame = Dataset.from_list(ROWS)
    frame.to_csv(files["csv"], index=False)
    frame.to_csv(files["tsv"], index=False, sep="\t")
    frame.to_parquet(files["parquet"])
    expected = module(ROWS)
    for file in files.values():
        data = module(file)
        assert data.labels == ["dog", "fox"]
        assert np.array_equal(data.splits["train"].labels, expected.splits["train"].labels)
        for row in range(4):
            theirs, ours = (one.splits["train"].texts[""].input_ids[row] for one in (data, expected))
            assert np.array_equal(theirs, ours)
    assert expected.tokenizer.decode(expected.splits["train"].texts[""].input_ids[1]) == "A fox jumps over it."


def test_batches_are_padded_to_their_longest_row(module: Any) -> None:
    data = module(ROWS, batch_size=4, pad_to_multiple_of=1, group_by_length=False)
    (batch,) = data.train_dataloader()
    lengths = data.splits["train"].lengths
    assert batch["input_ids"].shape == (4, lengths.max())
    assert batch["attention_mask"].sum(1).tolist() == [
        lengths[0] if label == 0 else lengths[1] for label in batch["labels"]
    ]
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {data.pad_token_id}
    alone = module([ROWS[0], {"text": "A dog sleeps.", "label": "fox"}], pad_to_multiple_of=1)
    assert "attention_mask" not in next(iter(alone.train_dataloader()))


def test_what_is_cut_is_told(module: Any) -> None:
    data = module(ROWS, max_length=5)
    assert data.splits["train"].describe("train").endswith("train.jsonl (4 texts cut to max_length)")
    assert data.splits["train"].lengths.tolist() == [5] * 4


def test_pairs_of_texts(module: Any) -> None:
    rows = [{"sentence1": "One.", "sentence2": "Two.", "label": i % 2} for i in range(4)]
    data = module(rows)
    assert data.labels == ["0", "1"]
    assert data.tokenizer.decode(data.splits["train"].texts[""].input_ids[0]) == "One.\nTwo."
    named = module(
        [{"a": "One.", "b": "Two.", "c": i % 2} for i in range(4)], text_columns=["a", "b"], label_column="c"
    )
    assert np.array_equal(named.splits["train"].texts[""].input_ids[0], data.splits["train"].texts[""].input_ids[0])


def test_the_first_token_of_a_word_has_its_label(module: Any) -> None:
    rows = [
        {"tokens": ["Paris", "is", "unbelievable"], "ner_tags": ["P", "O", "O"]},
        {"tokens": ["a"], "ner_tags": ["O"]},
    ]
    data = module(rows, task="tokens")
    assert data.labels == ["O", "P"]
    split = data.splits["train"]
    ids, labels = split.texts[""].input_ids[0], split.labels[0]
    assert data.tokenizer.decode(ids) == "Paris is unbelievable"
    first = [index for index, label in enumerate(labels) if label != -100]
    assert [int(labels[index]) for index in first] == [1, 0, 0]
    words = [data.tokenizer.decode(ids[a:b]) for a, b in zip(first, [*first[1:], None], strict=True)]
    assert words == ["Paris", " is", " unbelievable"]
    assert split.items.tolist() == [3, 1]
    cut = module(rows, task="tokens", max_length=2).splits["train"]
    assert len(cut.labels[0]) == 2


def test_labels_of_each_task(module: Any) -> None:
    several = module([{"text": "x", "labels": ["b", "a"]}, {"text": "y", "labels": []}], task="multi_label")
    assert several.splits["train"].labels.tolist() == [[1, 1], [0, 0]]
    numbers = module([{"text": "x", "label": 1}, {"text": "y", "label": -0.5}], task="regression")
    assert numbers.splits["train"].labels.tolist() == [1, -0.5]
    assert numbers.labels is None
    booleans = module([{"text": "x", "label": True}, {"text": "y", "label": False}])
    assert booleans.labels == ["false", "true"]
    assert booleans.splits["train"].labels.tolist() == [1, 0]
    named = module([{"text": "x", "label": 1}, {"text": "y", "label": 0}], labels=["no", "yes"])
    assert named.splits["train"].labels.tolist() == [1, 0]


def test_a_share_of_the_rows_is_held_out(module: Any) -> None:
    data = module(ROWS * 5, validation_fraction=0.2)
    assert len(data.splits["train"]) == 16
    assert len(data.splits["validation"]) == 4


def test_bad_rows_may_be_dropped(module: Any) -> None:
    data = module([*ROWS, {"text": " ", "label": "dog"}], on_bad_row="drop")
    assert len(data.splits["train"]) == 4
    assert "1 bad rows dropped" in data.splits["train"].describe("train")


def rows_with(**fields: Any) -> list[dict[str, Any]]:
    return [*ROWS, ROWS[0] | fields]


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty text": (rows_with(text=" "), {}, r"train\.jsonl, row 5: the field 'text' is empty"),
    "no text": (rows_with(text=None), {}, r"row 5: the field 'text' is null, expected a string"),
    "no column": (
        [{"body": "x", "label": 0}],
        {},
        r"row 1: the field 'text' or .* is missing; the row has 'body', 'la",
    ),
    "no label": ([{"text": "x"}], {}, r"row 1: the field 'label' is missing; the row has 'text'"),
    "label null": (rows_with(label=None), {}, r"row 5: the label is null, and the labels are 'dog', 'fox'"),
    "label float": (rows_with(label=1.5), {}, r"row 5: the label is a float, and the labels are 'dog', 'fox'"),
    "outside": (
        rows_with(label=2),
        {"labels": ["dog", "fox"]},
        r"row 5: the label is 2, and there are 2 labels, numbered",
    ),
    "below": ([{"text": "x", "label": -1}, *ROWS], {}, r"texts in some rows and numbers in others, such as -1"),
    "unnamed": (
        rows_with(label="cat"),
        {"labels": ["dog", "fox"]},
        r"row 5: the label is 'cat', and the labels are 'dog'",
    ),
    "one class": (
        [ROWS[0]] * 3,
        {},
        r"the training rows have one label alone, 'dog', so there is nothing to tell apart",
    ),
    "no number": (
        rows_with(label="x"),
        {"task": "regression"},
        r"row 1: the label is 'dog', and a regression needs a fin",
    ),
    "infinite": ([{"text": "x", "label": 1e999}], {"task": "regression"}, r"the label is inf, and a regression needs"),
    "one number": ([{"text": "x", "label": 3}] * 2, {"task": "regression"}, r"one label alone, 3\.0"),
    "numbers": (
        [{"text": "x", "label": 10**6 + i} for i in range(3)],
        {},
        r"3 different numbers up to 1000002, which are",
    ),
    "words": (
        [{"tokens": ["a", "b"], "ner_tags": [0]}],
        {"task": "tokens"},
        r"row 1: the row has 2 words and 1 labels",
    ),
    "no words": (
        [{"tokens": [], "ner_tags": []}],
        {"task": "tokens"},
        r"row 1: the field 'tokens' is a list, expected a",
    ),
    "no list": (
        [{"text": "x", "labels": "a"}],
        {"task": "multi_label"},
        r"multi_label needs a list of labels, which may",
    ),
    "task": (ROWS, {"task": "pairs"}, r"task='pairs' is unknown"),
    "three texts": (ROWS, {"text_columns": ["a", "b", "c"]}, r"name one column, or the two of a pair"),
    "labels twice": (ROWS, {"labels": ["dog", "dog"]}, r"name at least two, each once"),
    "batch": (ROWS, {"batch_size": 0}, r"batch_size is 0, but must be at least 1"),
    "fraction": (ROWS, {"validation_fraction": 0.01}, r"leaves the training or the validation split empty"),
    "missing": ("nowhere.csv", {}, r"nowhere\.csv: no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named_with_their_place(name: str, module: Any) -> None:
    rows, settings, message = BAD[name]
    with pytest.raises(PaCAError, match=message):
        module(rows, **settings)


def test_a_label_that_no_training_row_has_is_refused_in_validation(module: Any, tmp_path: Path) -> None:
    other = written(tmp_path / "val.jsonl", [ROWS[0], {"text": "A cat.", "label": "cat"}])
    with pytest.raises(PaCAError, match=r"val\.jsonl, row 2: the label is 'cat', and the labels are 'dog', 'fox'"):
        module(ROWS, validation=other)
    with pytest.warns(UserWarning, match="no training row has the label 'cat'"):
        module(ROWS, validation=other, labels=["cat", "dog", "fox"])


def test_damaged_tables_are_named(module: Any, tmp_path: Path) -> None:
    for content, message in {
        "text,label\nx,dog\ny\n": r"rows\.csv, row 2: has 1 values, and the first line names 2 columns",
        'text,label\n"x,dog\n': r"rows\.csv, line 2: is not valid CSV",
        "text,text\nx,dog\n": r"rows\.csv, line 1: names the column 'text' more than once",
        "text,label\n": r"rows\.csv: has no rows",
        "text,label\nx,\ny,dog\n": r"rows\.csv, row 1: the label is '', and the labels are 'dog'",
    }.items():
        (tmp_path / "rows.csv").write_text(content)
        with pytest.raises(PaCAError, match=message):
            module(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_bytes(b"text,label\n\xff,dog\n")
    with pytest.raises(PaCAError, match=r"rows\.csv: is not UTF-8"):
        module(str(tmp_path / "rows.csv"))


def test_names_are_found_in_the_labels() -> None:
    assert found_names(["b", "a", "b"]) == ["a", "b"]
    assert found_names(["0", "2"]) == ["0", "1", "2"]
    assert found_names([True, False]) == ["false", "true"]


def test_a_rank_without_a_row_of_its_own_trains_nothing(module: Any) -> None:
    from paca_lightning.tasks.data.sampler import BatchOrder
    from paca_lightning.tasks.data.text_loader import TextReader

    split = module(ROWS[:3]).splits["train"]
    batches = [
        [
            TextReader(split, 2, 8, 64).__getitems__(batch)[""]["labels"]
            for batch in BatchOrder(split.lengths, 1, rank=r, world_size=2)
        ]
        for r in range(2)
    ]
    labels = torch.cat([label for rank in batches for label in rank])
    assert sorted(labels.tolist()) == [-100, 0, 0, 1]
