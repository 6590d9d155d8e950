"""Every field of a row is used, refused by name, or reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.conversation import Conversation
from tests.tasks.rows import FIXTURES, GOOD, chat, converted, write_rows

TURNS = chat("one?", "1")["messages"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def only(row: dict[str, Any], format: Any = "auto") -> Conversation:
    """The one conversation of a row."""
    ((_, found),) = converted([(1, row)], format)
    if isinstance(found, PaCAError):
        raise found
    return found


@pytest.mark.parametrize(("off", "on"), [(0, 1), (False, True), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["weight", "train", "training", "loss", "loss_weight"])
def test_a_mark_says_whether_a_turn_is_trained(name: str, off: Any, on: Any) -> None:
    marked = [*TURNS[:1], {**TURNS[1], name: off}, *TURNS[:1], {**TURNS[1], name: on}]
    assert only({"messages": marked}).masks == {1: False, 3: True}
    shifted = only({"system": "Be kind.", "messages": marked})
    assert shifted.masks == {2: False, 4: True}
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", name: off}]
    assert only({"conversations": sharegpt}).masks == {1: False}
    assert only({"messages": [TURNS[0], {**TURNS[1], name: None}]}).masks == {}


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"weight": 0.5}, r"'messages\[1\].weight' is 0.5, expected 0 or 1"),
        ({"train": "no"}, r"'messages\[1\].train' is 'no', expected 0 or 1"),
        ({"weight": 1, "train": False}, r"'weight', 'train' of 'messages\[1\]' contradict each other"),
    ],
)
def test_a_mark_that_cannot_be_honoured_is_refused(marks: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        only({"messages": [TURNS[0], {**TURNS[1], **marks}]})


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"train": False}, {"training": False}, {"loss_weight": 0.0}],
    ids=lambda mark: next(iter(mark)),
)
def test_a_row_that_is_marked_as_not_trained_is_refused(mark: dict[str, Any]) -> None:
    for row in (GOOD, {"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(PaCAError, match="the whole row is marked as not trained; remove it"):
            only({**row, **mark})
    assert only({**GOOD, "weight": 0.7}).unread == ("weight",)


def test_messages_may_be_the_json_of_them() -> None:
    assert only({"messages": json.dumps(TURNS)}).messages == TURNS
    assert (
        only(
            {"conversations": json.dumps([{"from": "human", "value": "one?"}, {"from": "gpt", "value": "1"}])}
        ).messages
        == TURNS
    )
    with pytest.raises(PaCAError, match="'messages' is a text that is not valid JSON"):
        only({"messages": "[one?"}, "chat")


def test_a_row_has_one_system_text() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *TURNS]
    assert only({"messages": messages, "system": "Be kind."}).messages == messages
    with pytest.raises(PaCAError, match="a system text of its own and a system message, which differ"):
        only({"messages": messages, "system": "Be brief."})


def test_history_comes_before_the_question() -> None:
    row = {"instruction": "And its population?", "output": "11 million.", "history": [["Capital?", "Lisbon."]]}
    contents = ["Capital?", "Lisbon.", "And its population?", "11 million."]
    assert [message["content"] for message in only(row).messages] == contents
    assert [message["content"] for message in only({**row, "history": json.dumps(row["history"])}).messages] == contents
    with pytest.raises(PaCAError, match=r"'history\[0\]' is \['Capital\?'\], expected a \[question, answer\] pair"):
        only({**row, "history": [["Capital?"]]})


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"id": "1", **CALL}]},
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
    ],
)
def test_tool_calls_of_every_kind_become_one_kind(call: dict[str, Any]) -> None:
    messages = [TURNS[0], {"role": "assistant", "content": None, **call}, {"role": "tool", "content": "rain"}]
    conversation = only({"messages": [*messages, TURNS[1]]})
    (found,) = conversation.messages[1]["tool_calls"]
    assert {key: found[key] for key in CALL} == CALL
    assert conversation.messages[1]["content"] == ""
    assert conversation.unread == ()


def test_tools_of_sharegpt_rows() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ],
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
    }
    conversation = only(row)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == [CALL]
    assert conversation.arguments["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"tool_calls": [{"arguments": {}}]}, "expected tool calls with a name and arguments"),
        ({"tool_calls": "{"}, r"'messages\[1\].tool_calls' is a text that is not valid JSON"),
    ],
)
def test_a_broken_tool_call_is_named(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        only({"messages": [TURNS[0], {"role": "assistant", "content": "", **turn}]})


def test_a_tool_result_needs_a_call_before_it() -> None:
    with pytest.raises(PaCAError, match="turn 3 has the role 'tool' where 'user' is due"):
        only({"messages": [*TURNS, {"role": "tool", "content": "rain"}]})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_one_name(name: str) -> None:
    conversation = only({"messages": [TURNS[0], {**TURNS[1], name: "hm"}]})
    assert conversation.messages[1]["reasoning_content"] == "hm"


def test_system_texts_and_template_arguments_of_a_row() -> None:
    for name in ("system", "system_prompt", "system_message"):
        assert only({**GOOD, name: "Be kind."}).messages[0] == {"role": "system", "content": "Be kind."}
    extra = {"enable_thinking": False, "documents": [{"text": "a"}], "chat_template_kwargs": {"date": "today"}}
    conversation = only({**GOOD, **extra})
    assert conversation.arguments == {"documents": [{"text": "a"}], "enable_thinking": False, "date": "today"}
    assert conversation.unread == ()


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt", "messages", "max_length"])
def test_a_row_does_not_change_the_call_of_the_template(name: str) -> None:
    with pytest.raises(PaCAError, match=f"'chat_template_kwargs' sets '{name}', which belongs to the call"):
        only({**GOOD, "chat_template_kwargs": {name: "x"}})


def test_prompts_and_completions_in_messages_train_the_completion_alone() -> None:
    conversation = only({"prompt": [*TURNS, {"role": "user", "content": "two?"}], "completion": TURNS[1:]})
    assert [message["content"] for message in conversation.messages] == ["one?", "1", "two?", "1"]
    assert conversation.masks == {1: False}


def test_fields_that_nothing_uses_are_named() -> None:
    row = {"id": 7, "messages": [{**TURNS[0], "name": "Ann"}, {**TURNS[1], "id": "a"}], "source": "web", "tags": []}
    assert only(row).unread == ("id", "source", "messages[].name", "messages[].id")
    alpaca = {"instruction": "a", "input": float("nan"), "output": "b", "category": "c"}
    assert only(alpaca).unread == ("category",)
    assert only({"text": "### Human: a### Assistant: b", "id": 1}).unread == ("id",)
    assert only({"text": "a document", "meta": {"a": 1}}, "text").unread == ("meta",)


def test_pandas_nulls_are_nulls() -> None:
    assert only({"instruction": "a", "input": float("nan"), "output": "b"}).messages[0]["content"] == "a"
    with pytest.raises(PaCAError, match="the field 'output' is null"):
        only({"instruction": "a", "output": float("nan")})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "chosen": "a", "rejected": "b"}, r"'chosen' and 'rejected' make it a preference pair.*\(DPO\)"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pair"),
        ({**GOOD, "label": False}, r"'label' rates the answer.*\(KTO\)"),
        ({**GOOD, "images": ["cat.jpg"]}, "'images' belongs to a model of images, video or sound"),
        ({**GOOD, "audios": ["cat.wav"]}, "'audios' belongs to a model of images"),
        ({"question": "a?", "choices": ["b", "c"], "answer": 1}, "multiple-choice question: use MMLUDataModule"),
    ],
)
def test_a_row_of_another_task_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=f"here, row 1: .*{message}"):
        only(row)
    assert isinstance(converted([(1, GOOD), (2, row)], "chat")[1][1], PaCAError)


def test_empty_fields_of_other_tasks_do_no_harm() -> None:
    assert only({**GOOD, "images": [], "chosen": None, "rejected": ""}).unread == ()


@pytest.mark.parametrize("name", ["kto", "dpo", "image", "tool_calls", "reasoning"])
def test_files_whose_fields_the_template_cannot_take_are_refused(module: Any, name: str) -> None:
    with pytest.raises(PaCAError, match=f"{name}.jsonl, row 1: "):
        module(FIXTURES / "fields" / f"{name}.jsonl").prepare_data()


def test_unused_fields_are_told_with_their_count_before_training(
    module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**GOOD, "id": 1, "source": "web"}, {**GOOD, "id": 2}, GOOD]
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level("INFO"):
            module(write_rows(tmp_path / "train.jsonl", rows)).prepare_data()
        assert "train: Fields not used, and in how many conversations: id (2), source (1)." in caplog.text
