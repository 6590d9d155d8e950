"""Prompts and training samples."""

import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.mmlu.prompts import build_prompt, prompt_text
from paca_lightning.tasks.mmlu.training_samples import training_samples
from tests.mmlu_files import question
from tests.tiny import tiny_tokenizer


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
    # The first token of a row has no loss, as nothing precedes it.
    counts = [made(loss_on=loss_on).trained_lengths.tolist() for loss_on in ("answer", "text")]
    assert counts == [[sum(trained)], [len(ids) - 1]]
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
