"""Every format gives the same conversations, and a bad row is named."""

from pathlib import Path
from typing import Any

import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.decode import marked_text
from tests.tasks.rows import FIXTURES, GOOD, chat, read, write_rows


def test_chat_messages() -> None:
    rows = read(FIXTURES / "chat.jsonl")
    assert rows[0] == (1, [("user", "What is your name?"), ("assistant", "My name is Ada.")])
    assert [row for row, _ in rows] == [1, 2, 3, 4, 5, 6]


def test_sharegpt() -> None:
    system_first = [("system", "Answer in one word."), ("user", "The largest ocean?"), ("assistant", "Pacific.")]
    assert read(FIXTURES / "sharegpt.jsonl")[1] == (2, system_first)


def test_alpaca_joins_the_input_to_the_instruction() -> None:
    rows = read(FIXTURES / "alpaca.json")
    assert rows[0] == (1, [("user", "Sort these numbers.\n\n3, 1, 2"), ("assistant", "1, 2, 3")])
    assert rows[2][1][0] == ("user", "Write a haiku about rain.")


def test_guanaco_text_is_split_into_turns() -> None:
    turns = [
        ("user", "Add 2 and 3."),
        ("assistant", "2 + 3 = 5."),
        ("user", "And 4 more?"),
        ("assistant", "That makes 9."),
    ]
    assert read(FIXTURES / "guanaco.jsonl")[1] == (2, turns)


def test_prompts_with_completions(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 3?", "completion": "5"}, {"system": "Be brief.", "prompt": "Hi", "completion": "Hello"}]
    assert read(write_rows(tmp_path / "rows.jsonl", rows)) == [
        (1, [("user", "2 + 3?"), ("assistant", "5")]),
        (2, [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]),
    ]


def test_content_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "your name?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Ada"}]}
    assert read(write_rows(tmp_path / "rows.jsonl", [row])) == [
        (1, [("user", "What is your name?"), ("assistant", "Ada")])
    ]


BEST_PATHS = [
    [
        ("user", "How often should I water a cactus?"),
        ("assistant", "About once in two weeks in summer, and hardly ever in winter."),
        ("user", "And a fern?"),
        ("assistant", "Keep the soil of a fern moist at all times."),
    ],
    [("user", "Name a prime number above 10."), ("assistant", "11 is prime.")],
    [
        ("user", "Translate 'bread' to French."),
        ("assistant", "Bread is 'pain' in French."),
        ("user", "And to Italian?"),
        ("assistant", "It is 'pane' in Italian."),
    ],
]


@pytest.mark.parametrize("name", ["oasst_trees.jsonl", "oasst_messages.jsonl"])
def test_the_best_path_through_an_oasst_tree_skips_deleted_and_unanswered_messages(name: str) -> None:
    assert [turns for _, turns in read(FIXTURES / name)] == BEST_PATHS


@pytest.mark.parametrize("name", ["oasst_trees.jsonl", "oasst_messages.jsonl"])
def test_all_paths_of_an_oasst_tree_end_with_an_answer(name: str) -> None:
    paths = read(FIXTURES / name, tree_paths="all")
    endings = [turns[-1][1] for _, turns in paths]
    assert endings == [
        "Keep the soil of a fern moist at all times.",
        "Ferns like water.",
        "Yes, unless it is very hard.",
        "Every day, generously.",
        "11 is prime.",
        "13 is prime.",
        "It is 'pane' in Italian.",
    ]
    assert len({row for row, _ in paths}) == 3  # the row tells which tree a path comes from


NODE = {"message_id": "m1", "text": "hi", "role": "prompter", "rank": None, "replies": []}

BAD_ROWS = {
    "json": ('{"messages": [', "row 2: is not valid JSON"),
    "not an object": ("[1, 2]", "row 2: is a list, expected an object"),
    "no messages": ({"message": "hi"}, "row 2: the field 'messages' is missing; the row has 'message'"),
    "messages no list": ({"messages": "hi"}, "row 2: the field 'messages' is a str, expected a list of messages"),
    "message no object": ({"messages": ["hi"]}, r"row 2: the field 'messages\[0\]' is a str, expected an object"),
    "no content": ({"messages": [{"role": "user"}]}, r"row 2: the field 'messages\[0\].content' is missing"),
    "null content": (chat("a", None), r"row 2: the field 'messages\[1\].content' is null, expected a string"),  # type: ignore[arg-type]
    "unknown role": (chat("a", "b", roles=("user", "wizard")), r"row 2: the field 'messages\[1\].role' is 'wizard'"),
    "half a character": (
        chat("a", "\ud83d"),
        r"row 2: the field 'messages\[1\].content' holds half of a surrogate pair",
    ),
    "no turns": ({"messages": []}, "row 2: a conversation without an assistant turn"),
    "no answer": (chat("only me"), "row 2: a conversation without an assistant turn"),
    "empty answer": (chat("a", "  "), "row 2: the assistant's turn 2 is empty"),
    "assistant first": (chat("a", "b", roles=("assistant", "user")), "row 2: roles out of order: turn 1 .*'assistant'"),
    "user twice": (
        chat("a", "b", roles=("user",)),
        "row 2: roles out of order: turn 2 has the role 'user' where 'assistant'",
    ),
    "late system": (chat("a", "b", "c", roles=("user", "assistant", "system")), "row 2: roles out of order: turn 3"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(module: Any, tmp_path: Path, name: str) -> None:
    row, message = BAD_ROWS[name]
    path = write_rows(tmp_path / "train.jsonl", [GOOD, row, GOOD])
    with pytest.raises(PaCAError, match=f"train.jsonl, {message}"):
        module(path).prepare_data()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"instruction": "a", "output": "b"}, {"instruction": "a"}, "row 2: the field 'output' is missing"),
        ({"text": "### Human: a### Assistant: b"}, {"text": "Human: a"}, "row 2: the field 'text' does not start with"),
        (
            {"prompt": NODE | {"replies": [NODE | {"role": "assistant"}]}},
            {"prompt": NODE},
            "row 2: .* without an assistant",
        ),
        ({"prompt": NODE | {"role": "user"}}, GOOD, "row 1: the field 'role' of message 'm1' is 'user'"),
        ({"prompt": NODE | {"replies": 3}}, GOOD, "row 1: the field 'replies' of message 'm1' is not a list"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "row 2: the field 'completion' is missing"),
        ({"text": "a raw document"}, GOOD, "row 1: the fields 'text' fit no known format .*`format: text`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            GOOD,
            r"row 1: the field 'messages\[0\].content\[0\]' is 'image', expected a part of the type 'text'",
        ),
        ({"question": "a"}, GOOD, "row 1: the fields 'question' fit no known format"),
        (
            NODE | {"parent_id": None, "message_tree_id": "m1"},
            NODE | {"message_id": "m2", "parent_id": "m9", "message_tree_id": "m1"},
            "the field 'parent_id' of row 2 is 'm9'",
        ),
    ],
)
def test_a_bad_row_of_another_format_is_named(
    module: Any, tmp_path: Path, first: Any, second: Any, message: str
) -> None:
    with pytest.raises(PaCAError, match=message):
        module(write_rows(tmp_path / "train.jsonl", [first, second])).prepare_data()


@pytest.mark.parametrize("names", [("question", "answer"), ("query", "response")])
def test_a_question_and_its_answer(tmp_path: Path, names: tuple[str, str]) -> None:
    row = dict(zip(names, ("How many?", "#### 7"), strict=True))
    assert read(write_rows(tmp_path / "rows.jsonl", [row])) == [(1, [("user", "How many?"), ("assistant", "#### 7")])]


def test_marked_segments_alone_are_trained_and_no_template_is_used(module: Any) -> None:
    data = module(FIXTURES / "segments.jsonl")
    data.setup("fit")
    (sample,) = data.splits["train"].dataset
    text = "Question: how many legs has a spider?\n⟦Answer: eight.⟧"
    assert marked_text(data.tokenizer, sample["input_ids"], sample["trained"]) == text


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([{"text": "a", "label": False}], "no segment is trained"),
        ([{"text": "a", "label": 1}], r"'segments\[0\].label' is 1, expected true or false"),
        (["a"], "'segments' is a list, expected a list of objects"),
    ],
)
def test_segments_that_cannot_be_used_are_refused(
    module: Any, tmp_path: Path, segments: list[Any], message: str
) -> None:
    with pytest.raises(PaCAError, match=message):
        module(write_rows(tmp_path / "rows.jsonl", [{"segments": segments}])).prepare_data()


def test_questions_of_arithmetic_are_detected(module: Any) -> None:
    data = module(FIXTURES / "questions.jsonl")
    data.setup("fit")
    assert data.splits["train"].report.formats == {"question_answer": 1}
