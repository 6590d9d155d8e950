"""paca-lightning eval: lm-eval's tasks on a base model and on adapters, without a merged copy."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paca_lightning import PaCAError, load_adapter
from paca_lightning.cli import main
from paca_lightning.tools.evaluation.command import eval as evaluate
from paca_lightning.tools.evaluation.harness import load_tasks
from paca_lightning.tools.evaluation.results import differences, values_of
from tests.artefacts import write_random_adapter
from tests.tiny import tiny_llama, tiny_model_directory, tiny_tokenizer

QUESTIONS = [(f"Question: {name}?\nAnswer:", [f" {name} Paris", " lazy dog"]) for name in ("user", "fox", "quick", "A")]
TASK = """\
task: {name}
tag: {name}_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base model, two adapters and a folder with two tasks on local files."""
    root = tmp_path_factory.mktemp("eval")
    tiny_model_directory(root / "base")
    for seed, name in enumerate(("one", "two")):
        write_random_adapter(root / name, 16, seed)
    (root / "tasks").mkdir()
    rows = [{"question": text, "choices": choices, "answer": 0} for text, choices in QUESTIONS]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "tasks" / "first.yaml").write_text(TASK.format(name="my_first", data=root / "rows.jsonl"))
    (root / "tasks" / "lost.yaml").write_text(TASK.format(name="lost", data=root / "nowhere.jsonl"))
    return {name: str(root / name) for name in ("base", "one", "two", "tasks")}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def accuracy(model: nn.Module) -> float:
    """The share of questions whose first choice has the larger likelihood, in plain PyTorch."""
    tokenizer, right = tiny_tokenizer(), 0
    for text, choices in QUESTIONS:
        scores = []
        for choice in choices:
            context, whole = tokenizer(text)["input_ids"], tokenizer(text + choice)["input_ids"]
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole))))
        right += scores[0] > scores[1]
    return right / len(QUESTIONS)


def test_base_and_adapters_side_by_side(places: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    arguments = ["--model", places["base"], "--adapter", places["one"], places["two"], "--tasks", "my_first"]
    file = tmp_path / "out" / "results.json"
    main(["eval", *arguments, "--include-path", places["tasks"], "--batch-size", "3", "--output", str(file)])
    content = json.loads(file.read_text())
    expected = {"base": accuracy(tiny_llama())}
    for name in ("one", "two"):
        model = tiny_llama()
        load_adapter(model, places[name])
        expected[name] = accuracy(model)
    assert {name: of["my_first"]["acc"]["value"] for name, of in content["results"].items()} == expected
    assert len(set(expected.values())) > 1  # or this would tell nothing
    changes = {name: of["my_first"]["acc"]["value"] for name, of in content["differences"].items()}
    assert changes == {name: expected[name] - expected["base"] for name in ("one", "two")}
    assert content["questions"] == {"my_first": 4}
    out = capsys.readouterr().out
    assert "my_first" in out
    assert f"Written: {file}" in out


def test_one_adapter_alone_and_a_limit(places: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    evaluate(places["base"], "my_*", places["one"], base=False, include_path=places["tasks"], limit=2, output=str(file))
    content = json.loads(file.read_text())
    assert list(content["results"]) == ["one"]
    assert content["differences"] == {}
    assert content["questions"] == {"my_first": 2}
    assert sorted(os.listdir(tmp_path)) == ["cache", "results.json"]  # no merged copy


def results(scores: list[float], **entries: Any) -> dict[str, Any]:
    samples = [{"doc_id": number, "filter": "none", "acc": score} for number, score in enumerate(scores)]
    values = {"acc,none": sum(scores) / len(scores), "acc_stderr,none": 0.25, "alias": "t", "sample_len": len(scores)}
    return {"results": {"t": values | entries}, "samples": {"t": samples}}


def test_a_difference_has_the_error_of_paired_questions() -> None:
    before, after = results([0.0, 1.0, 0.0, 1.0]), results([1.0, 1.0, 0.0, 1.0])
    assert str(values_of(after)["t"]["acc"]) == "0.7500 ± 0.2500"
    change = differences(before, after)["t"]["acc"]
    assert change.value == 0.25
    assert change.stderr == pytest.approx(torch.tensor([1.0, 0.0, 0.0, 0.0]).std().item() / 2)
    assert change.signed() == "+0.2500 ± 0.2500"


def test_what_is_no_mean_over_questions_has_no_error_of_its_difference() -> None:
    more = {"perplexity,none": 3.0, "perplexity_stderr,none": "N/A", "exact_match,strict": 0.5}
    before, after = results([0.0, 1.0], **more), results([1.0, 1.0], **more | {"acc,none": 0.9})
    found = differences(before, after)["t"]
    assert found["acc"].stderr is None
    assert found["perplexity"].stderr is None
    assert set(found) == {"acc", "perplexity", "exact_match (strict)"}
    assert values_of(before)["t"]["perplexity"].stderr is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0"),
        ({"output": "."}, "is a directory"),
        ({"tasks": []}, "There is no task"),
        ({"include_path": "nowhere"}, "--include_path: 'nowhere' is no directory"),
        ({"device": "frob"}, "device='frob' cannot be used"),
        ({"tasks": "lost"}, r"The data of task 'lost' cannot be loaded \(.*nowhere.jsonl.*Relative paths"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    arguments: dict[str, Any], message: str, places: dict[str, str]
) -> None:
    given = {"tasks": "my_first", "include_path": places["tasks"]} | arguments
    with pytest.raises(PaCAError, match=message):
        evaluate("/no/model/is/loaded", **given)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(PaCAError, match=r"eval needs lm-eval.*pip install 'paca-lightning\[eval\]'"):
        evaluate("/no/model/is/loaded", "arc_easy")


def test_tags_and_numbers_of_examples(places: dict[str, str]) -> None:
    folder = places["tasks"]
    assert [task.config.task for task in load_tasks(["my_first_tag", "my_first"], folder, None)] == ["my_first"] * 2
    assert [load_tasks(["my_first"], folder, number)[0].get_config("num_fewshot") for number in (None, 0, 3)] == [
        0,
        0,
        3,
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [("unsafe_code: true", "runs code that the model writes"), ("doc_to_image: [question]", "asks about images")],
)
def test_what_cannot_be_run_is_named(setting: str, message: str, places: dict[str, str], tmp_path: Path) -> None:
    own = (Path(places["tasks"]) / "first.yaml").read_text()
    (tmp_path / "own.yaml").write_text(f"{own}{setting}\n")
    with pytest.raises(PaCAError, match=f"Task 'my_first' {message}"):
        load_tasks(["my_first"], str(tmp_path), None)


@pytest.mark.slow  # lm-eval reads its 15,000 files of tasks
def test_standard_tasks_are_found_or_told() -> None:
    with pytest.raises(PaCAError, match=r"There is no task 'arc_esay' in lm-eval\. Did you mean 'arc_easy'\?"):
        load_tasks(["arc_esay"], None, None)
    with pytest.raises(PaCAError, match=r"'arc_easy' cannot be loaded .*ai2_arc.* Run it once on a connected machine"):
        load_tasks(["arc_easy"], None, None)
