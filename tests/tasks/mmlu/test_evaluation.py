"""MMLU's evaluation: scores against naive ones, the data module and the callback under a Trainer, two processes."""

import csv
import json

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.mmlu import MMLUDataModule, MMLUEvaluation
from paca_lightning.tasks.mmlu.accuracy import score_groups, wilson_interval
from paca_lightning.tasks.mmlu.evaluator import MMLUEvaluator
from paca_lightning.tasks.mmlu.likelihood import cache_serves, deal, plan_batches, score
from paca_lightning.tasks.mmlu.metrics import MMLUAccuracy
from paca_lightning.tasks.mmlu.prompts import build_prompt
from paca_lightning.tasks.mmlu.sources import read_split
from tests.distributed_launch import launch
from tests.mmlu_files import CHOSEN, SIZES, question, write_csv_folders
from tests.tiny import tiny_llama, tiny_model_directory, tiny_tokenizer


@pytest.fixture
def mmlu(tmp_path):
    write_csv_folders(tmp_path / "mmlu")
    return str(tmp_path / "mmlu")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


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
    assert cache_serves(model.config, prompts)
    for batch in batches:
        assert_scores_of_whole_sequences(model, batch.prompts, score(model, batch.prompts, several_tokens=True))


def assert_scores_of_whole_sequences(model, prompts, scores):
    for prompt, row in zip(prompts, scores, strict=True):
        for option, length, value in zip(prompt.options, prompt.lengths, row, strict=True):
            ids = torch.tensor([[*prompt.tokens, *option]])
            log_likelihood = model(ids, use_cache=False).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            torch.testing.assert_close(value, log_likelihood[-len(option) :].sum() / length, atol=1e-5, rtol=1e-5)


SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GPT_NEO = {"vocab_size": 384, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["local"], 2]]}


@pytest.mark.parametrize("method", ["letter", "likelihood"])
@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, sliding_window=16),
        Gemma2Config(**SHAPE, sliding_window=16),
        Gemma3TextConfig(**SHAPE, sliding_window=16),
        Qwen2Config(**SHAPE, sliding_window=16, use_sliding_window=True, max_window_layers=1),
        GPTNeoConfig(**GPT_NEO, window_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_scores_of_a_windowed_model_equal_those_of_whole_sequences(config, method, tokenizer):
    """Padding and a cache would shift what a window covers."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    texts = ("Why?", "Why is it so?", "Why is it so, and for how long? " * 4)
    asked = [question(question=text, choices=("1", "the answer", "2 of it", "x " * 8)) for text in texts]
    prompts = [build_prompt(tokenizer, q, [], method, 2048) for q in asked]
    assert not cache_serves(config, prompts)
    several_tokens = method == "likelihood"
    scores = score(model, prompts, several_tokens=several_tokens, cached=False)
    assert_scores_of_whole_sequences(model, prompts, scores)


@pytest.mark.parametrize(
    ("config", "serves"),
    [
        (MistralConfig(sliding_window=16), False),
        (MistralConfig(sliding_window=None), True),
        (MistralConfig(sliding_window=4096), True),
        (Gemma3Config(text_config={"sliding_window": 16}), False),
        (Qwen2Config(sliding_window=16), True),
        (GPT2Config(), True),
        (LlamaConfig(layer_types=["full_attention"] * 32), True),
        (Qwen3NextConfig(), False),
    ],
)
def test_a_cache_serves_where_each_layer_sees_the_whole_prompt(config, serves, tokenizer):
    assert cache_serves(config, [build_prompt(tokenizer, question(), [], "letter", 2048)]) is serves


def test_the_evaluator_uses_no_cache_where_it_does_not_serve(mmlu, tokenizer):
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=8)).eval()
    used = []
    model.register_forward_pre_hook(lambda _, args, kwargs: used.append(kwargs["use_cache"]), with_kwargs=True)
    MMLUEvaluator(read_split(mmlu, "test")[:2], [], tokenizer, shots=0).evaluate(model)
    assert not any(used)


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
    assert counts["questions"].sum() == 3
    scores = {s.name: s for s in score_groups(counts["correct"].tolist(), counts["questions"].tolist())}
    assert list(scores) == ["micro", "macro", "other", "anatomy", "virology"]
    assert scores["micro"].accuracy == pytest.approx(2 / 3)
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


def test_a_resumed_run_has_no_accuracy_before_training(mmlu, model_directory, tmp_path, capsys):
    def fit(root, **settings):
        evaluation = MMLUEvaluation(methods=["letter"], shots=0, limit=1, baseline=True)
        run = trainer(root, logger=CSVLogger(root, name=None, version=""), callbacks=[evaluation], **settings)
        run.fit(CausalLMModule(model_directory), data(mmlu, model_directory), ckpt_path=checkpoint, weights_only=True)
        return run, (root / "metrics.csv").read_text()

    checkpoint = None
    first, logged = fit(tmp_path / "first", max_epochs=1)
    assert "mmlu/before/accuracy" in logged
    checkpoint = tmp_path / "first.ckpt"
    first.save_checkpoint(checkpoint)
    capsys.readouterr()
    _, logged = fit(tmp_path / "second", max_epochs=2)
    assert "mmlu/accuracy" in logged
    assert "before" not in logged
    assert "before" not in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "second" / "mmlu").iterdir())] == [
        f"validate-step=000010.{suffix}" for suffix in ("csv", "json")
    ]


def test_a_run_directory_that_cannot_be_made_is_found_before_anything_runs(mmlu, model_directory, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    run = trainer(tmp_path / "file" / "run", callbacks=[MMLUEvaluation(mmlu, model_directory)])
    with pytest.raises(PaCAError, match=r"The run's directory: .* cannot be written"):
        run.test(ForeignModule(), torch.utils.data.DataLoader(torch.ones(2, 1)), verbose=False)


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


@pytest.mark.parametrize("model", [None, torch.nn.Linear(1, 1), tiny_llama().model])
def test_a_module_without_a_language_model(model, mmlu, model_directory, tmp_path):
    module = ForeignModule()
    module.model = model
    run = trainer(tmp_path, callbacks=[MMLUEvaluation(mmlu, model_directory)])
    complaint = f"in the attribute 'model' of ForeignModule, where there is {type(model).__name__}"
    with pytest.raises(PaCAError, match=complaint):
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


def evaluate_in_two(mmlu, model_directory, root):
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
    whole = evaluator.evaluate(tiny_llama(max_position_embeddings=2048), dist.get_rank(), 2)
    assert evaluator.evaluate(sharded, dist.get_rank(), 2) == whole


@pytest.mark.distributed
def test_two_processes_equal_one_exactly(mmlu, model_directory, tmp_path):
    """The last batches of a subject are smaller than the others, and their number is odd for the sharded model."""
    launch(evaluate_in_two, 2, mmlu, model_directory, str(tmp_path / "two"))
    run = trainer(tmp_path / "one", callbacks=[MMLUEvaluation(batch_size=3)])
    run.test(CausalLMModule(model_directory), data(mmlu, model_directory, batch_size=3), verbose=False)
    one, two = (tmp_path / name / "mmlu" / "test-step=000000.json" for name in ("one", "two"))
    assert json.loads(two.read_text()) == json.loads(one.read_text())
