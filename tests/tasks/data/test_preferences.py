"""Rows of preferences in the known formats: what is context, what is trained, and what is refused."""

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks import InstructionDataModule, PreferenceDataModule
from tests.tasks.rows import chat, write_rows
from tests.tiny import END_OF_TURN as END

USER, GOOD, BAD = "Is ice wet?", "When it melts.", "Dogs bark."
ASK = {"role": "user", "content": USER}
CHOSEN, REJECTED = ({"role": "assistant", "content": text} for text in (GOOD, BAD))
HUMAN = {"from": "human", "value": USER}
TALK = f"\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: {USER}\n\nAssistant:"
SEGMENT = {"segments": [{"text": f"{USER} ", "label": False}, {"text": GOOD, "label": True}]}

# Rows, and what stands before the answers if it is not the one question.
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    "a system text": {"system": "Be brief.", "prompt": USER, "chosen": GOOD, "rejected": BAD},
    "messages": {"prompt": [ASK], "chosen": [CHOSEN], "rejected": [REJECTED]},
    "a text before messages": {"prompt": USER, "chosen": [CHOSEN], "rejected": [REJECTED]},
    "whole conversations": {"chosen": [ASK, CHOSEN], "rejected": [ASK, REJECTED]},
    "UltraFeedback": {
        **{"prompt": USER, "chosen": [ASK, CHOSEN], "rejected": [ASK, REJECTED], "messages": [ASK, CHOSEN]},
        **{"score_chosen": 9.0, "score_rejected": 2.0},
    },
    "Anthropic-hh": {"chosen": f"{TALK} {GOOD}", "rejected": f"{TALK} {BAD}"},
    "Anthropic-hh with its prompt": {"prompt": TALK, "chosen": f" {GOOD}", "rejected": f" {BAD}"},
    "LLaMA-Factory sharegpt": {
        "conversations": [HUMAN],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "LLaMA-Factory openai": {"messages": [ASK], "chosen": CHOSEN, "rejected": REJECTED},
    "LLaMA-Factory alpaca": {"instruction": USER, "input": "", "chosen": GOOD, "rejected": BAD},
    "Orca": {"system": "Be brief.", "question": USER, "chosen": GOOD, "rejected": BAD},
    "turns before texts": {"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD},
    "other names": {"prompt": USER, "chosen_response": GOOD, "rejected_response": BAD},
    "texts with a common beginning": {"chosen": f"{USER} {GOOD}", "rejected": f"{USER} {BAD}"},
}
LABELS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": USER, "completion": GOOD, "label": True},
    "a text for a label": {"prompt": USER, "completion": GOOD, "label": "True"},
    "messages": {"prompt": [ASK], "completion": [CHOSEN], "label": True},
    "LLaMA-Factory openai": {"messages": [ASK, CHOSEN], "kto_tag": True},
    "LLaMA-Factory alpaca": {"instruction": USER, "output": GOOD, "kto_tag": True},
    "several turns": {"messages": [{**ASK, "content": "Hello"}, {**CHOSEN, "content": "Hi."}, ASK, CHOSEN], "label": 1},
}


def texts(data: PreferenceDataModule, number: int = 0) -> list[tuple[str, str]]:
    """What stands before the trained tokens of each conversation of a document, and the trained tokens."""
    document = data.splits["train"].dataset[number]
    bounds = [0, document["chosen_length"], document["length"]]
    found = []
    for start, end in pairwise(bounds):
        if start < end:
            ids, trained = np.array(document["input_ids"][start:end]), np.array(document["trained"][start:end])
            found.append((data.tokenizer.decode(ids[: trained.argmax()]), data.tokenizer.decode(ids[trained])))
    return found


@pytest.fixture
def read(tokenizer_directory: str, tmp_path: Path) -> Any:
    def read(rows: list[Any], **settings: Any) -> PreferenceDataModule:
        path = write_rows(tmp_path / "rows.jsonl", rows)
        cache = {"cache_dir": str(tmp_path / "cache")}
        data = PreferenceDataModule(tokenizer_directory, str(path), **(cache | settings))
        data.setup("fit")
        return data

    return read


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_read(name: str, read: Any) -> None:
    row = PAIRS[name]
    (before, good), (same, bad) = texts(read([row]))
    if name == "texts with a common beginning":
        assert before.strip() == same.strip() == USER  # the space may be part of an answer's first token
    else:
        assert before == same
        assert before.endswith(f"user\n{USER}{END}\n<|im_start|>assistant\n")
    assert (good.strip(), bad.strip()) == (f"{GOOD}{END}", f"{BAD}{END}")
    assert ("Be brief." in before) == ("system" in row)
    assert ("Hello" in before) == ("hh" in name)


@pytest.mark.parametrize("name", LABELS)
def test_rows_with_labels_are_read(name: str, read: Any) -> None:
    bad = {"prompt": USER, "completion": BAD, "label": False}
    data = read([LABELS[name], bad])
    for number, answer in enumerate((GOOD, BAD)):
        ((before, trained),) = texts(data, number)
        assert trained == f"{answer}{END}"
        assert before.endswith(f"user\n{USER}{END}\n<|im_start|>assistant\n")
    assert (data.splits["train"].column("chosen_length") > 0).tolist() == [True, False]


def test_parquet_is_read_as_json_is(read: Any, tokenizer_directory: str, tmp_path: Path) -> None:
    rows = [PAIRS["messages"], PAIRS["messages"]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = PreferenceDataModule(tokenizer_directory, str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert texts(data, 1) == texts(read(rows), 1)


@pytest.mark.parametrize("row", [PAIRS["texts"], LABELS["texts"]])
def test_tables_are_read_as_json_is(row: dict[str, Any], read: Any, tokenizer_directory: str, tmp_path: Path) -> None:
    rows = [row, {**row, "prompt": "Why,\nthen?", **({"label": False} if "label" in row else {})}]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)
    data = PreferenceDataModule(tokenizer_directory, str(tmp_path / "rows.csv"), cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert texts(data, 1) == texts(read(rows), 1)


PAIR = PAIRS["texts"]
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": USER, "chosen": GOOD}, "the field 'rejected' is missing or empty: a pair needs both sides"),
    ({**PAIR, "chosen": ""}, "the field 'chosen' is missing or empty"),
    ({**PAIR, "chosen": "  "}, "the chosen answer: the assistant's turn 2 is empty"),
    ({**PAIR, "rejected": GOOD}, "'chosen' and 'rejected' are equal"),
    ({**PAIR, "rejected": 3}, "the field 'rejected' is an int, expected a text or messages"),
    ({**PAIR, "rejected": [REJECTED]}, "are a text and messages"),
    ({"chosen": [ASK, CHOSEN], "rejected": [{**ASK, "content": "Why?"}, REJECTED]}, "different prompts: turn 1"),
    ({"prompt": "Why?", "chosen": [ASK, CHOSEN], "rejected": [ASK, REJECTED]}, "the prompts differ"),
    ({"prompt": [CHOSEN], "chosen": [ASK, CHOSEN], "rejected": [ASK, REJECTED]}, "the prompts differ"),
    ({"chosen": [ASK, CHOSEN], "rejected": [ASK]}, "without an assistant turn"),
    ({"chosen": [ASK, CHOSEN], "rejected": [ASK, CHOSEN, ASK, CHOSEN]}, "chosen ends where the other one goes on"),
    ({"chosen": GOOD, "rejected": BAD}, "the answers have no prompt"),
    ({"chosen": [CHOSEN], "rejected": [REJECTED]}, "the answers have no prompt"),
    ({"instruction": USER, "chosen": [CHOSEN], "rejected": [REJECTED]}, "beside 'instruction', the answers must be"),
    ({**PAIR, "images": ["a.png"]}, "'images' belongs to a model of images"),
    (chat(USER, GOOD), "neither 'chosen' and 'rejected' nor a 'label'"),
    ({"prompt": USER, "completion": GOOD, "label": "maybe"}, "the field 'label' is 'maybe', expected true"),
    ({"prompt": USER, "completion": "", "label": True}, "the assistant's turn 2 is empty"),
    ({"messages": [ASK, CHOSEN, ASK], "label": True}, "the last turn is not an answer"),
    ({"input_ids": [1, 2], "label": True}, "a row of the format 'tokens' cannot have a label"),
    ({"thing": 1, "label": True}, "fit no known format"),
]


def test_bad_rows_are_told_together_each_at_its_place(read: Any, tmp_path: Path) -> None:
    with pytest.raises(PaCAError) as caught:
        read([PAIR, *(row for row, _ in BAD_ROWS[:20])])
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("20 rows cannot be used. Correct them, or set on_bad_row: drop to leave them out.")
    for number, (line, (row, message)) in enumerate(zip(lines[1:], BAD_ROWS, strict=False), start=2):
        assert line.startswith(f"  {tmp_path / 'rows.jsonl'}, row {number}: "), row
        assert message in line, row
    assert len(read([PAIR, BAD_ROWS[0][0]], on_bad_row="drop").splits["train"].dataset) == 1


@pytest.mark.parametrize(("row", "message"), BAD_ROWS[20:])
def test_other_bad_rows(row: dict[str, Any], message: str, read: Any) -> None:
    with pytest.raises(PaCAError, match=message):
        read([PAIR, row])


def test_a_split_has_rows_of_one_kind_and_labels_of_both(read: Any, tmp_path: Path) -> None:
    with pytest.raises(PaCAError, match=r"rows.jsonl, row 2: is a row with a label, but the rows before it are pairs"):
        read([PAIR, LABELS["texts"]])
    with pytest.raises(
        PaCAError, match=r"all 2 rows are labelled as good\. KTO learns from both kinds: add bad answers"
    ):
        read([LABELS["texts"], LABELS["messages"]])


def test_settings_of_other_data_are_refused(read: Any) -> None:
    for settings, message in (
        ({"packing": True}, "no packing: preferences are not packed"),
        ({"streaming": True}, "no streaming"),
        ({"loss_on": "all"}, "no loss_on"),
        ({"format": "chat"}, "no format"),
    ):
        with pytest.raises(PaCAError, match=message):
            read([PAIR], **settings)


def test_what_is_cut_off_is_dropped_and_counted(read: Any) -> None:
    long = {"prompt": "fox " * 40, "chosen": GOOD, "rejected": BAD}
    late = {"prompt": USER, "chosen": "fox " * 60 + "a", "rejected": "fox " * 60 + "b"}
    split = read([PAIR, long, late], max_length=48).splits["train"]
    assert len(split.dataset) == 1
    assert split.dropped == 2


def test_batches_hold_the_chosen_conversations_before_the_rejected(read: Any) -> None:
    rows = [{"prompt": USER, "chosen": f"{GOOD} {i}", "rejected": f"{BAD} {i}"} for i in range(5)]
    data = read(rows, batch_size=5)
    (batch,) = data.train_dataloader()
    assert sorted(batch["rows"].tolist()) == list(range(5))
    answers = [data.tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]]
    numbers = batch["rows"].tolist()
    assert answers == [f"{text} {i}{END}" for text in (GOOD, BAD) for i in numbers]


def test_strange_answers_are_those_of_the_next_rows(read: Any) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{GOOD} {i}", "label": i % 2 == 0} for i in range(4)]
    data = read(rows, batch_size=4)
    (batch,) = data.train_dataloader()
    texts = [data.tokenizer.decode(ids) for ids in batch["input_ids"]]
    for place, number in enumerate(batch["rows"].tolist()):
        assert f"user\n{number}?{END}" in texts[place]
        assert f"{GOOD} {number}{END}" in texts[place]
        assert f"user\n{number}?{END}" in texts[4 + place]
        assert f"{GOOD} {(number + 1) % 4}{END}" in texts[4 + place]
        assert batch["good"][place].item() == (number % 2 == 0)
    answers = [data.tokenizer.decode(ids[ids != -100]) for ids in batch["labels"]]
    assert answers[4:] == [f"{GOOD} {(number + 1) % 4}{END}" for number in batch["rows"].tolist()]


def test_weights_and_held_out_rows_keep_pairs_together(read: Any, tmp_path: Path) -> None:
    data = read([{**PAIR, "prompt": f"{i}?"} for i in range(10)], validation_fraction=0.2, max_samples=5)
    assert len(data.splits["validation"].dataset) == 2
    assert len(data.splits["train"].dataset) == 5
    for number in range(5):
        (before, _), (same, _) = texts(data, number)
        assert before == same
    assert data.checksum("train") != data.checksum("validation")


@pytest.mark.parametrize("row", [PAIRS["texts"], LABELS["texts"]])
def test_instruction_data_name_the_module_for_preferences(
    row: dict[str, Any], tokenizer_directory: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [json.dumps(row)])
    data = InstructionDataModule(tokenizer_directory, str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(PaCAError, match="PreferenceDataModule"):
        data.setup("fit")
