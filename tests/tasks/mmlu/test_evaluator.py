"""Scores of the evaluator against naive ones, and the accuracy they give."""

import pytest
import torch
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

from paca_lightning.tasks.mmlu.accuracy import score_groups, wilson_interval
from paca_lightning.tasks.mmlu.evaluator import MMLUEvaluator
from paca_lightning.tasks.mmlu.likelihood import cache_serves, deal, plan_batches, score
from paca_lightning.tasks.mmlu.metrics import MMLUAccuracy
from paca_lightning.tasks.mmlu.prompts import build_prompt
from paca_lightning.tasks.mmlu.sources import read_split
from tests.mmlu_files import question
from tests.tiny import tiny_llama


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
