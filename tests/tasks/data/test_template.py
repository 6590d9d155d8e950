"""What chat templates do to conversations: ends of turns, reasoning, tools, parts, and what is left out or added."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import ChatEncoder
from paca_lightning.tasks.data.conversation import Conversation
from paca_lightning.tasks.data.decode import marked_text
from tests.tasks.data.templates import (
    ADDED_TOKENS,
    COMMAND_A,
    COMMAND_A_LAST,
    CUTS_THINKING,
    GLM,
    GPT_OSS,
    PARTS,
    PHI,
    QWEN,
)
from tests.tasks.rows import GOOD, PLAIN, chat, write_rows
from tests.tiny import tiny_tokenizer

TWO = chat("one?", "1", "two?", "2")["messages"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED_TOKENS.get(template, [])})
    tokenizer.chat_template = template
    return tokenizer


def shown(template: str, messages: list[dict[str, Any]], loss_on: Any = "assistant", **others: Any) -> str:
    """The conversation as it is trained, with the trained tokens in ⟦ ⟧."""
    encoder = ChatEncoder(tokenizer_with(template), 1000, loss_on)
    (encoded,) = encoder.encode([encoder.spans(Conversation(messages, **others))])
    return marked_text(encoder.tokenizer, encoded.input_ids, encoded.trained)


def remarks(template: str, messages: list[dict[str, Any]], **others: Any) -> list[str]:
    return list(ChatEncoder(tokenizer_with(template), 1000).spans(Conversation(messages, **others)).remarks)


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (PHI, "⟦1<|end|>⟧", "⟦2<|end|>\n<|im_end|>⟧"),
        (GPT_OSS, "⟦<|channel|>final<|message|>1<|end|>⟧", "⟦<|channel|>final<|message|>2<|return|>⟧"),
        (COMMAND_A, "⟦<|RESPONSE|>1<|/RESPONSE|><|/TURN|>⟧", "⟦<|RESPONSE|>2<|/RESPONSE|><|/TURN|>⟧"),
        (
            COMMAND_A_LAST,
            "⟦<|RESPONSE|>1<|/RESPONSE|><|/TURN|>⟧",
            "⟦<|THINK|><|/THINK|><|RESPONSE|>2<|/RESPONSE|><|/TURN|>⟧",
        ),
    ],
    ids=["phi", "gpt-oss", "command-a", "command-a-last"],
)
def test_the_end_of_turn_is_trained_after_every_answer(template: str, first: str, second: str) -> None:
    text = shown(template, TWO)
    assert first in text
    assert text.rstrip().endswith(second)
    assert text.count("⟦") == 2
    assert "unended" not in remarks(template, TWO)


@pytest.mark.parametrize("template", [GLM, PLAIN], ids=["glm", "plain"])
def test_a_template_without_an_end_of_turn_is_named(template: str) -> None:
    assert remarks(template, TWO) == ["unended"]


def test_content_is_given_in_parts_to_a_template_that_ignores_strings() -> None:
    assert "one?" in shown(PARTS, TWO)
    assert "⟦1<|im_end|>⟧" in shown(PARTS, TWO)
    assert remarks(PARTS, TWO) == []


def test_text_that_the_template_leaves_out_is_noticed() -> None:
    thought = chat("6*7?", "<think>six sevens</think>42")["messages"]
    assert remarks(CUTS_THINKING, thought) == ["left_out"]
    assert remarks(CUTS_THINKING, TWO) == []
    ignores_system = "{% set messages = messages | rejectattr('role', 'eq', 'system') | list %}" + CUTS_THINKING
    assert remarks(ignores_system, [{"role": "system", "content": "Be kind."}, *TWO]) == ["context"]


def test_text_that_the_template_adds_to_an_answer_is_noticed() -> None:
    thinks = "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    adds = QWEN.replace("{{ m['content'] }}", thinks + "{{ m['content'] }}")
    assert remarks(adds, TWO) == ["added"]
    assert remarks(QWEN, TWO) == []
    assert remarks(GPT_OSS, TWO) == []  # a header of special tokens, which the model has to produce


@pytest.mark.parametrize(("template", "header"), [(QWEN, "<think>\nsix sevens\n</think>"), (GPT_OSS, "six sevens")])
def test_reasoning_goes_where_the_template_takes_it(template: str, header: str) -> None:
    answered = [TWO[0], {"role": "assistant", "content": "42", "reasoning_content": "six sevens"}]
    trained = shown(template, answered).partition("⟦")[2]
    assert header in trained
    assert "42" in trained
    assert remarks(template, answered) == []
    dropped = [*answered, *TWO]
    assert remarks(template, dropped) == ["reasoning"]


def test_tools_calls_and_results_go_where_the_template_takes_them() -> None:
    messages = [
        {"role": "user", "content": "weather in Oslo?"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    text = shown(QWEN, messages, arguments={"tools": [{"type": "function", "function": {"name": "weather"}}]})
    assert text.index('"name": "weather"') < text.index("weather in Oslo?")
    called = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert f"⟦Let me look.{called}<|im_end|>⟧" in text
    assert "user\nrain<|im_end|>" in text
    assert "⟦It rains.<|im_end|>⟧" in text


@pytest.mark.parametrize(
    ("messages", "others", "name"),
    [
        ([TWO[0], {**TWO[1], "tool_calls": [CALL]}], {}, "'tool_calls'"),
        (TWO, {"arguments": {"tools": [CALL["function"]]}}, "'tools'"),
        (TWO, {"arguments": {"documents": [{"text": "a"}]}}, "'documents'"),
        ([TWO[0], {**TWO[1], "reasoning_content": "hm"}], {}, "'reasoning_content'"),
    ],
)
def test_what_the_template_does_not_read_is_refused_by_name(messages: Any, others: Any, name: str) -> None:
    with pytest.raises(PaCAError, match=f"does not read {name}"):
        shown(CUTS_THINKING, messages, **others)


def test_a_template_argument_is_passed_on_or_named_as_unread() -> None:
    arguments = {"enable_thinking": False}
    encoder = ChatEncoder(tokenizer_with(CUTS_THINKING), 1000)
    assert encoder.spans(Conversation(TWO, arguments)).unread == ["enable_thinking"]
    reads = "{% if enable_thinking is defined and not enable_thinking %}{{ '/no_think' }}{% endif %}" + CUTS_THINKING
    assert shown(reads, TWO, arguments=arguments).startswith("/no_think")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_an_answer_marked_as_not_trained_is_context(loss_on: Any) -> None:
    text = shown(CUTS_THINKING, TWO, loss_on, masks={1: False})
    assert "assistant\n1<|im_end|>" in text.replace("⟦", "").replace("⟧", "")
    assert "⟦1" not in text
    trained = "".join(part.partition("⟧")[0] for part in text.split("⟦")[1:])
    assert "2<|im_end|>" in trained
    assert "1<|im_end|>" not in trained
    assert ("one?" in trained) == (loss_on == "all")


def test_a_mask_on_another_turn_is_refused_or_named() -> None:
    with pytest.raises(PaCAError, match=r"turn 1 \(user\) is marked as not trained, which loss_on: all cannot do"):
        shown(CUTS_THINKING, TWO, "all", masks={0: False})
    encoder = ChatEncoder(tokenizer_with(CUTS_THINKING), 1000)
    assert encoder.spans(Conversation(TWO, masks={0: True})).unread == ["marks to train user turns"]


def test_tokens_that_begin_and_end_a_text_are_not_doubled() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template.replace("<|im_end|>", "' + eos_token + '")
    talk = [{"role": "user", "content": "<s>one?"}, {"role": "assistant", "content": "1<|im_end|>"}]
    text = ChatEncoder(tokenizer, 1000).spans(Conversation(talk)).text
    assert text.count("<s>") == 1
    assert text.count("<|im_end|>") == 2
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template + "{{ eos_token }}"
    rendered = ChatEncoder(tokenizer, 1000).spans(Conversation(TWO))
    assert rendered.text.count("<s>") == 1
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["1<|im_end|>", "2<|im_end|>"]


@pytest.mark.parametrize("answer", ["<|im_end|>", " <|im_end|>", "\n<|im_end|> "])
def test_an_answer_of_an_end_of_turn_token_alone_is_trained_as_one(answer: str) -> None:
    talk = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": answer}]
    rendered = ChatEncoder(tiny_tokenizer(), 1000).spans(Conversation(talk))
    assert [rendered.text[start:end].strip() for start, end in rendered.spans] == ["<|im_end|>"]


@pytest.mark.parametrize(("change", "expected"), [("trim", []), ("upper", ["context", "left_out"])])
def test_white_space_that_a_template_changes_is_not_text_left_out(change: str, expected: list[str]) -> None:
    template = QWEN.replace("{{ m['content'] }}", f"{{{{ m['content'].replace('  ', ' ') | {change} }}}}")
    talk = [{"role": "user", "content": " a  b "}, {"role": "assistant", "content": " c  d "}]
    assert remarks(template, talk) == expected


def test_a_warning_shows_the_first_conversation_or_strict_template_refuses(module: Any, tmp_path: Path) -> None:
    thought = chat("6*7?", "<think>six sevens</think>42")
    path = write_rows(tmp_path / "train.jsonl", [GOOD, thought, thought])
    expected = (
        r"train: In 2 conversations, the chat template leaves out the text of an answer, or part of it. The first, "
        r"with what is trained in ⟦ ⟧: .*train.jsonl, row 2: .*⟦42<\|im_end\|>⟧"
    )
    with pytest.warns(UserWarning, match=f"(?s){expected}"):
        module(path, chat_template=CUTS_THINKING).prepare_data()
    with pytest.raises(PaCAError, match=f"(?s){expected}.*strict_template: false"):
        module(path, chat_template=CUTS_THINKING, strict_template=True).prepare_data()


def test_the_marks_of_a_file_survive_the_cache(module: Any, tmp_path: Path) -> None:
    marks = [("weight", 0, 1), ("train", False, True), ("loss", False, True), ("loss_weight", 0.0, 1.0)]
    rows = []
    for name, off, on in marks:
        row = json.loads(json.dumps({"messages": TWO}))
        row["messages"][1][name], row["messages"][3][name] = off, on
        rows.append(row)
    for _ in range(2):
        data = module(write_rows(tmp_path / "train.jsonl", rows))
        data.setup("fit")
        for sample in data.splits["train"].dataset:
            text = marked_text(data.tokenizer, sample["input_ids"], sample["trained"])
            assert text.count("⟦") == 1
            assert "⟦2<|im_end|>⟧" in text
