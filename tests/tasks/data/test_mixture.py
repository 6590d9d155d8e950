"""Several sources of a split: weights, most samples, settings of their own."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.instruction import InstructionDataModule
from tests.tasks.rows import chat, write_rows


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Three files of ten, four and two rows."""
    return [
        str(write_rows(tmp_path / f"{name}.jsonl", [chat(f"{name}{i}", "b") for i in range(count)]))
        for name, count in (("a", 10), ("b", 4), ("c", 2))
    ]


def mixture(module: Any, train: Any, **settings: Any) -> InstructionDataModule:
    data = InstructionDataModule(**module().hparams | {"train": train} | settings)
    data.prepare_data()
    data.setup("fit")
    return data


def counts(data: Any) -> Counter[tuple[str, int]]:
    split = data.splits["train"]
    return Counter(zip([Path(file).stem for file in split.files()], split.column("row").tolist(), strict=True))


def test_a_weight_says_how_often_a_source_comes_in_an_epoch(module: Any, sources: list[str]) -> None:
    a, b, c = sources
    train = [{"location": a, "weight": 0.5}, {"location": b, "weight": 2.5}, c]
    data = mixture(module, train)
    found = counts(data)
    of_source = Counter(file for file, _ in found.elements())
    assert of_source == {"a": 5, "b": 10, "c": 2}
    assert {found["a", row] for row in range(1, 11)} == {0, 1}
    assert sorted(found["b", row] for row in range(1, 5)) == [2, 2, 3, 3]
    assert counts(mixture(module, train)) == found
    others = [counts(mixture(module, train, seed=seed)) for seed in range(1, 4)]
    assert any(other != found for other in others)


def test_shares_are_told(module: Any, sources: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        mixture(module, [{"location": sources[0], "weight": 0.5}, sources[1]])
    assert "a.jsonl: 5 of its 10 conversations an epoch (weight 0.5), 56% of all" in caplog.text
    assert "b.jsonl: 4 of its 4 conversations an epoch (weight 1), 44% of all" in caplog.text


def test_held_out_rows_are_not_repeated_in_training(module: Any, sources: list[str]) -> None:
    data = mixture(module, [{"location": sources[0], "weight": 3}], validation_fraction=0.3)
    validation = set(data.splits["validation"].column("row"))
    assert len(validation) == len(data.splits["validation"].dataset) == 3
    assert not validation & set(data.splits["train"].column("row"))
    assert len(data.splits["train"].dataset) == 21


def test_most_samples_of_a_source_are_its_first_and_in_all_are_drawn(module: Any, sources: list[str]) -> None:
    first = mixture(module, [{"location": sources[0], "max_samples": 3}, sources[2]])
    assert sorted(counts(first)) == [("a", 1), ("a", 2), ("a", 3), ("c", 1), ("c", 2)]
    sliced = mixture(module, [{"location": sources[0], "max_samples": 3, "split": "train[50%:]"}])
    assert sorted(counts(sliced)) == [("a", 6), ("a", 7), ("a", 8)]
    drawn = mixture(module, sources, max_samples=6)
    assert drawn.splits["train"].dataset.num_rows == 6
    assert len({file for file, _ in counts(drawn)}) > 1


def test_each_source_may_have_its_format(module: Any, sources: list[str], tmp_path: Path) -> None:
    text = str(write_rows(tmp_path / "text.jsonl", [{"text": "A raw document."}]))
    data = mixture(module, [sources[2], {"location": text, "format": "text"}])
    assert data.splits["train"].report.formats == {"chat": 2, "text": 1}


def test_sources_come_from_a_config(module: Any, sources: list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(InstructionDataModule, "data")
    train = [{"location": sources[0], "weight": 0.5}, sources[1]]
    config = parser.parse_object({"data": dict(module().hparams) | {"train": train}})
    data = parser.instantiate(config).data
    data.setup("fit")
    assert data.splits["train"].dataset.num_rows == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight is 0 and max_samples None, but weight must be above 0"),
        ({"max_samples": 0}, "weight is 1.0 and max_samples 0, but weight must be above 0 and max_samples at least 1"),
    ],
)
def test_a_setting_out_of_range_names_its_source(
    module: Any, sources: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PaCAError, match=f"a.jsonl: {message}"):
        mixture(module, [{"location": sources[0], **settings}])


def test_weights_of_a_validation_source_are_refused(module: Any, sources: list[str]) -> None:
    with pytest.raises(PaCAError, match="weight is a setting of training sources"):
        mixture(module, sources[0], validation={"location": sources[1], "weight": 2})
