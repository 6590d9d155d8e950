"""Rows in the formats of public projects: the text that each trains, or the reason why it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.decode import decoded_runs
from tests.tasks.data.templates import QWEN
from tests.tasks.rows import read, write_rows
from tests.tiny import END_OF_TURN as END

ASK, SAY = {"role": "user", "content": "Is ice wet?"}, {"role": "assistant", "content": "When it melts."}
HUMAN, GPT = {"from": "human", "value": "Is ice wet?"}, {"from": "gpt", "value": "When it melts."}
ALPACA = {"instruction": "Name a river.", "input": "", "output": "The Rhine."}
CALL = {"name": "tide", "arguments": {"port": "Brest"}}
TOOL_TURNS = [
    {"from": "human", "value": "High water at Brest?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "16:10"},
    {"from": "gpt", "value": "At ten past four."},
]
TREE = {
    "message_tree_id": "t",
    "prompt": {
        "message_id": "t",
        "text": "Name a metal.",
        "role": "prompter",
        "replies": [
            {"message_id": "u", "text": "Wood.", "role": "assistant", "rank": 1, "replies": []},
            {"message_id": "v", "text": "Tin.", "role": "assistant", "rank": 0, "replies": []},
        ],
    },
}
MESSAGES = [
    {"message_id": "t", "parent_id": None, "message_tree_id": "t", "role": "prompter", "text": "Name a metal."},
    {"message_id": "u", "parent_id": "t", "message_tree_id": "t", "role": "assistant", "text": "Wood.", "rank": 1},
    {"message_id": "v", "parent_id": "t", "message_tree_id": "t", "role": "assistant", "text": "Tin.", "rank": 0},
]

READ: dict[str, tuple[list[Any], str, list[str]]] = {
    "LLaMA-Factory alpaca": (
        [{**ALPACA, "system": "Be brief.", "history": [["Name a lake.", "Garda."]]}],
        "alpaca",
        [f"Garda.{END}", f"The Rhine.{END}"],
    ),
    "LLaMA-Factory sharegpt": (
        [{"conversations": [HUMAN, GPT], "system": "Be brief."}],
        "sharegpt",
        [f"When it melts.{END}"],
    ),
    "LLaMA-Factory sharegpt with tools": (
        [{"conversations": TOOL_TURNS, "tools": json.dumps([{"name": "tide", "parameters": {}}])}],
        "sharegpt",
        [f"<tool_call>{json.dumps(CALL)}</tool_call>{END}", f"At ten past four.{END}"],
    ),
    "LLaMA-Factory openai": (
        [{"messages": [{"role": "system", "content": "Be brief."}, ASK, SAY]}],
        "chat",
        [f"When it melts.{END}"],
    ),
    "axolotl alpaca with its whole prompt": (
        [{**ALPACA, "text": "Name a river. The Rhine."}],
        "alpaca",
        [f"The Rhine.{END}"],
    ),
    "axolotl sharegpt with weights": (
        [{"conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, {**GPT, "value": "No.", "weight": 1}]}],
        "sharegpt",
        [f"No.{END}"],
    ),
    "axolotl sharegpt by role": (
        [{"conversations": [{"role": "prompter", "value": "Is ice wet?"}, {"role": "bot", "value": "No."}]}],
        "sharegpt",
        [f"No.{END}"],
    ),
    "axolotl chat_template with marks": (
        [{"messages": [ASK, {**SAY, "training": False}, ASK, {"role": "assistant", "content": "No."}]}],
        "chat",
        [f"No.{END}"],
    ),
    "axolotl input_output": (
        [{"segments": [{"label": False, "text": "Red and blue: "}, {"label": True, "text": "purple"}]}],
        "segments",
        ["purple"],
    ),
    "OASST trees": ([TREE], "oasst", [f"Tin.{END}"]),
    "OASST messages": (MESSAGES, "oasst_messages", [f"Tin.{END}"]),
    "GSM8K": (
        [{"question": "Two pens at 3 each?", "answer": "2 * 3 = <<2*3=6>>6\n#### 6"}],
        "question_answer",
        [f"2 * 3 = <<2*3=6>>6\n#### 6{END}"],
    ),
    "Dolly": (
        [{"instruction": "Name it.", "context": "The Rhine is a river.", "response": "Rhine.", "category": "qa"}],
        "alpaca",
        [f"Rhine.{END}"],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_public_format_is_read(module: Any, tmp_path: Path, name: str) -> None:
    rows, format, trained = READ[name]
    data = module(write_rows(tmp_path / "rows.jsonl", rows), chat_template=QWEN)
    data.setup("fit")
    assert data.splits["train"].report.formats == {format: 1}
    (sample,) = data.splits["train"].dataset
    runs = decoded_runs(data.tokenizer, sample["input_ids"], sample["trained"])
    assert [text for text, on in runs if on] == trained


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"article": "Ice melts.", "question": "Does it?", "answer": "Yes."}, "Ice melts.\n===\nDoes it?"),
        (
            {"context": "Ice melts.", "question": "Does it?", "answer": "Yes."},
            "Context: Ice melts.\nQuestion: Does it?",
        ),
        ({"context": "", "question": "Does it?", "answer": "Yes."}, "Does it?"),
        ({"instruction": "Does it?", "context": "Ice melts.", "response": "Yes."}, "Does it?\n\nIce melts."),
    ],
)
def test_the_context_of_a_question_is_asked_with_it(tmp_path: Path, row: dict[str, str], asked: str) -> None:
    turns = [("user", asked), ("assistant", "Yes.")]
    assert read(write_rows(tmp_path / "rows.jsonl", [row])) == [(1, turns)]


REFUSED: dict[str, tuple[Any, str]] = {
    "LLaMA-Factory alpaca preference": (
        {"instruction": "Name a river.", "input": "", "chosen": "The Rhine.", "rejected": "Rome."},
        "'chosen' and 'rejected' make it a preference pair",
    ),
    "LLaMA-Factory sharegpt preference": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "No."}},
        "'chosen' and 'rejected' make it a preference pair",
    ),
    "LLaMA-Factory alpaca KTO": ({**ALPACA, "kto_tag": False}, r"'kto_tag' rates the answer .*\(KTO\)"),
    "LLaMA-Factory sharegpt KTO": (
        {"messages": [ASK, SAY], "kto_tag": True},
        "keep the rows with 'kto_tag': true, and remove the field",
    ),
    "LLaMA-Factory images": (
        {"messages": [{**ASK, "content": "<image>Is it wet?"}, SAY], "images": ["ice.png"]},
        "'images' belongs to a model of images, video or sound",
    ),
    "LLaMA-Factory videos": ({"conversations": [HUMAN, GPT], "videos": ["ice.mp4"]}, "'videos' belongs to a model"),
    "axolotl chat_template with parts of messages": (
        {"messages": [ASK, {**SAY, "train_detail": [{"begin_offset": 0, "end_offset": 4, "train": False}]}]},
        r"'messages\[1\].train_detail' trains parts of a message",
    ),
    "axolotl reflection": (
        {**ALPACA, "reflection": "No river runs there.", "corrected": "The Elbe."},
        "beside 'corrected' and 'reflection', 'output' is a draft",
    ),
    "axolotl explainchoice": (
        {"question": "Is ice wet?", "choices": ["no", "yes"], "solution": "no"},
        "multiple-choice question: use MMLUDataModule",
    ),
    "a context that is no text": (
        {"question": "Is ice wet?", "context": {"title": ["Ice"]}, "answer": "No."},
        "the field 'context' is a dict, expected a string",
    ),
    "axolotl completion": ({"text": "Ice melts."}, "raw text needs `format: text`"),
    "MMLU": (
        {"question": "Is ice wet?", "subject": "physics", "choices": ["no", "yes"], "answer": 0},
        "multiple-choice question: use MMLUDataModule",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_public_format_of_another_task_is_refused_with_the_reason(module: Any, tmp_path: Path, name: str) -> None:
    row, reason = REFUSED[name]
    with pytest.raises(PaCAError, match=f"rows.jsonl, row 1: .*{reason}"):
        module(write_rows(tmp_path / "rows.jsonl", [row])).prepare_data()
