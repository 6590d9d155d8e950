"""Instruction data: every format to the same conversations, the right tokens trained, and mistakes named."""

import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import ChatEncoder
from paca_lightning.tasks.data.collate import DocumentReader, PadCollator
from paca_lightning.tasks.data.formats import conversations
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.sampler import BatchOrder
from paca_lightning.tasks.data.tokenizer import DEFAULT_CHAT_TEMPLATE
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tools import data as data_tool
from tests.tiny import tiny_tokenizer

FIXTURES = Path(__file__).parents[1] / "data"
QUICKSTART = Path(__file__).parents[2] / "configs" / "data" / "quickstart"


def read(path: Path, **options: Any) -> list[tuple[int, list[tuple[str, str]]]]:
    settings = {"format": "auto", "text_column": "text", "tree_paths": "best"} | options
    pairs = conversations(Source(str(path)).rows(), path.name, **settings)
    return [(row, [(message["role"], message["content"]) for message in messages]) for row, messages in pairs]


# Formats


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


def test_files_are_told_apart_by_content_not_by_name(tmp_path: Path) -> None:
    expected = read(FIXTURES / "chat.jsonl")
    lines = (FIXTURES / "chat.jsonl").read_bytes()
    rows = [json.loads(line) for line in lines.splitlines()]
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(rows, indent=2), encoding="utf-8")
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "lines.txt").write_bytes(b"\n" + lines)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    for path in tmp_path.iterdir():
        first = 2 if path.name == "lines.txt" else 1  # the line's number
        assert read(path) == [(row + first - 1, turns) for row, turns in expected], path.name


def test_a_long_json_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paca_lightning.tasks.data.json_list._CHUNK_BYTES", 7)  # boundaries fall everywhere
    rows = [{"text": "é🙂" * i, "n": i} for i in range(20)]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert list(Source(str(tmp_path / "list.json")).rows()) == list(enumerate(rows, start=1))


# Chat templates and masks

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello é🙂!"},
    {"role": "user", "content": "Name?"},
    {"role": "assistant", "content": "Ada"},
]

LLAMA_2 = (  # a leading space before each answer, the system text inside the first user turn, no generation prompt
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system + '\n' if loop.first and system else '') }}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (  # earlier answers lose their reasoning, so that no rendering of a part is a prefix of the whole
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (  # no end-of-turn token: the line break is what ends an answer
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def trained_texts(tokenizer: PreTrainedTokenizerBase, talk: list[dict[str, str]] = TALK, **options: Any) -> list[str]:
    encoder = ChatEncoder(tokenizer, **({"max_length": 1000} | options))
    (encoded,) = encoder.encode([encoder.spans(talk)])
    edges = np.flatnonzero(np.diff(encoded.trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in edges]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ["Hello é🙂!<|im_end|>", "Ada<|im_end|>"]),
        (DEFAULT_CHAT_TEMPLATE, ["Hello é🙂!<|im_end|>", "Ada<|im_end|>"]),
        (LLAMA_2, [" Hello é🙂! <|im_end|>", " Ada <|im_end|>"]),
        (QWEN_3, ["Hello é🙂!<|im_end|>", "<think>\n\n</think>\n\nAda<|im_end|>"]),
        (PLAIN, ["Hello é🙂!\n", " Ada\n"]),  # the space is in the same token
    ],
    ids=["chatml", "default", "llama-2", "qwen-3", "plain"],
)
def test_the_assistants_turns_are_trained_with_their_end_and_nothing_else(
    template: str | None, expected: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    assert trained_texts(tokenizer) == expected


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    assert trained_texts(tokenizer) == ["Hello é🙂!</s>", "Ada</s>"]


def test_loss_on_all_trains_everything_that_something_comes_before() -> None:
    tokenizer = tiny_tokenizer()
    encoder = ChatEncoder(tokenizer, max_length=1000, loss_on="all")
    (encoded,) = encoder.encode([encoder.spans(TALK)])
    assert not encoded.trained[0]
    assert encoded.trained[1:].all()
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_hides_the_answers_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] | length }}{% for m in messages %}x{% endfor %}"
    with pytest.raises(PaCAError, match=r"leaves no trace of turn 3.*loss_on: all"):
        trained_texts(tokenizer)


# The data module


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def module(tokenizer_directory: str, tmp_path: Path) -> Any:
    """Builds a data module with its cache in the test's directory."""

    def build(train: Path | str = FIXTURES / "chat.jsonl", **settings: Any) -> InstructionDataModule:
        defaults = {"tokenizer": tokenizer_directory, "cache_dir": str(tmp_path / "cache")}
        return InstructionDataModule(train=str(train), **(defaults | settings))

    return build


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def chat(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> dict[str, Any]:
    turns = enumerate(contents)
    return {"messages": [{"role": roles[i % len(roles)], "content": content} for i, content in turns]}


def test_batches_hold_what_the_model_needs(module: Any) -> None:
    data = module(batch_size=6)
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].shape[1] % 8 == 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        text, answer = (data.tokenizer.decode(part) for part in (ids[mask.bool()], ids[labels != -100]))
        assert text.endswith(f"<|im_start|>assistant\n{answer}\n")
        assert answer.endswith("<|im_end|>")
        assert torch.equal(labels[labels != -100], ids[labels != -100])


def test_the_shipped_quickstart_data_is_understood(module: Any) -> None:
    data = module(QUICKSTART / "train.jsonl", validation=str(QUICKSTART / "validation.jsonl"))
    data.setup("fit")
    assert len(data.splits["train"].dataset) > 100
    assert len(data.splits["validation"].dataset) > 10
    assert data.splits["train"].column("truncated").sum() == data.splits["train"].dropped == 0


def test_tokens_are_cached_until_the_file_or_a_setting_changes(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = ChatEncoder.encode
    monkeypatch.setattr(ChatEncoder, "encode", lambda self, texts: encoded.append(len(texts)) or encode(self, texts))
    path = write_rows(tmp_path / "train.jsonl", [chat("a", "b"), chat("c", "d")])
    for _ in range(2):
        data = module(path)
        data.prepare_data()
        data.setup("fit")
        data.setup("fit")
    assert encoded == [2]
    module(path, loss_on="all").prepare_data()
    assert encoded == [2, 2]
    write_rows(path, [chat("a", "b"), chat("c", "d"), chat("e", "f")])
    module(path).prepare_data()
    assert encoded == [2, 2, 3]


def test_held_out_rows_are_drawn_by_seed_and_paths_of_a_tree_stay_together(module: Any) -> None:
    data = module(FIXTURES / "oasst_trees.jsonl", tree_paths="all", validation_fraction=0.34)
    data.setup()
    rows = {name: set(split.column("row")) for name, split in data.splits.items()}
    assert len(rows["validation"]) == 1
    assert rows["train"] | rows["validation"] == {1, 2, 3}
    assert not rows["train"] & rows["validation"]
    again = module(FIXTURES / "oasst_trees.jsonl", tree_paths="all", validation_fraction=0.34)
    again.setup("validate")
    assert set(again.splits["validation"].column("row")) == rows["validation"]
    others = {tuple(sorted(set(split_by(module, seed).column("row")))) for seed in range(8)}
    assert len(others) > 1


def split_by(module: Any, seed: int) -> Any:
    data = module(FIXTURES / "chat.jsonl", validation_fraction=0.34, seed=seed)
    data.setup("fit")
    return data.splits["validation"]


def test_truncation_drops_and_counts_what_has_nothing_left_to_learn(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("short", "answer"), chat("x" * 100, "cut off whole"), chat("short", "y" * 100)]
    data = module(write_rows(tmp_path / "train.jsonl", rows), max_length=40)
    data.setup("fit")
    split = data.splits["train"]
    assert split.column("row").tolist() == [1, 3]
    assert split.column("truncated").tolist() == [False, True]
    assert (split.column("trained_length") > 0).all()
    assert "2 conversations" in split.describe()
    assert "1 cut to max_length; 1 dropped" in split.describe()

    with pytest.raises(PaCAError, match=r"none of the 3 conversations keeps a token to train within max_length 5"):
        module(tmp_path / "train.jsonl", max_length=5).setup("fit")


def test_raw_text_is_trained_whole_in_pieces_of_the_greatest_length(module: Any, tmp_path: Path) -> None:
    texts = ["The dog sleeps on. " * 20, "Paris", "é"]
    path = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    data = module(path, format="text", max_length=16)
    data.setup("fit")
    split, tokenizer = data.splits["train"], data.tokenizer
    pieces: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for row in split.dataset:
        assert row["length"] <= 16
        assert row["trained"] == [False] + [True] * (row["length"] - 1)
        pieces[row["row"]] += row["input_ids"]
    assert [tokenizer.decode(ids) for ids in pieces.values()] == [text + "<|im_end|>" for text in texts]
    assert len(split.dataset) > 3
    assert split.dropped == split.column("truncated").sum() == 0


def test_raw_text_begins_as_the_tokenizer_has_it(module: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(tmp_path / "bos")
    path = write_rows(tmp_path / "text.jsonl", [{"text": "Paris"}])
    data = module(path, format="text", tokenizer=str(tmp_path / "bos"))
    data.setup("fit")
    assert data.tokenizer.decode(data.splits["train"].dataset[0]["input_ids"]) == "<s>Paris<|im_end|>"


# Several files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory of two shards of different formats, and a file that is none."""
    directory = tmp_path / "shards"
    directory.mkdir()
    rows = [chat("a", "b"), chat("c", "d")]
    pq.write_table(pa.Table.from_pylist(rows), directory / "train-00000-of-00002.parquet")
    write_rows(directory / "train-00001-of-00002.jsonl", [{"instruction": "e", "output": "f"}])
    (directory / "README.md").write_text("Two shards.")
    return directory


def test_a_directory_a_pattern_and_a_list_of_files_are_read_in_order(module: Any, shards: Path) -> None:
    first, second = (str(path) for path in sorted(shards.glob("train-*")))
    for train in (str(shards), str(shards / "train-*"), [first, second], [str(shards / "*.parquet"), second]):
        data = InstructionDataModule(**module().hparams | {"train": train})
        data.setup("fit")
        split = data.splits["train"]
        assert split.files() == [first, first, second]
        assert split.column("row").tolist() == [1, 2, 1]
        assert "2 files" in split.describe()


def test_rows_of_the_same_number_in_two_files_are_held_out_apart(module: Any, shards: Path) -> None:
    data = module(shards, validation_fraction=0.34)
    data.setup("fit")
    assert {name: len(split.dataset) for name, split in data.splits.items()} == {"train": 2, "validation": 1}


def test_a_bad_row_is_named_with_its_file(module: Any, shards: Path) -> None:
    write_rows(shards / "train-00001-of-00002.jsonl", [{"instruction": "e", "output": "f"}, {"instruction": "g"}])
    with pytest.raises(PaCAError, match=r"train-00001-of-00002.jsonl, row 2: the field 'output' is missing"):
        module(shards).prepare_data()


def test_files_that_do_not_belong_together_or_are_not_there_are_refused(module: Any, shards: Path) -> None:
    with pytest.raises(PaCAError, match=r"no file matches \(looked for .*shards/\*\.gz"):
        module(shards / "*.gz").prepare_data()
    write_rows(shards / "test.jsonl", [chat("a", "b")])
    with pytest.raises(
        PaCAError, match=r"several splits \(test, train\).*such as '.*/shards/\*train\*', or '.*test\.jsonl'"
    ):
        module(shards).prepare_data()
    with pytest.raises(PaCAError, match="the list of data files is empty"):
        InstructionDataModule(**module().hparams | {"train": []}).prepare_data()


def test_packed_batches_fill_their_rows(module: Any) -> None:
    data = module(QUICKSTART / "train.jsonl", packing=True, max_length=512, batch_size=2)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(sorted(batch) == ["input_ids", "labels", "position_ids"] for batch in batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    assert data.splits["train"].column("length").sum() / tokens > 0.95
    trained = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert trained == data.splits["train"].column("trained_length").sum()


def test_a_tokenizer_without_a_template_gets_the_default(module: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    data = module(tokenizer=str(tmp_path / "bare"))
    data.setup("fit")
    assert data.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE

    (tmp_path / "own.jinja").write_text(PLAIN)
    data = module(tokenizer=str(tmp_path / "bare"), chat_template=str(tmp_path / "own.jinja"))
    data.setup("fit")
    assert data.tokenizer.chat_template == PLAIN


def test_the_data_tool_marks_trained_tokens(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    monkeypatch.setattr(data_tool, "Console", lambda: console)
    data_tool.data(module(validation_fraction=0.34), samples=1)
    text = console.export_text()
    assert "<|im_start|>assistant\n⟦" in text
    assert "<|im_end|>⟧" in text
    assert "validation" in text
    assert "dropped, no answer left" in text
    with pytest.raises(PaCAError, match="the data here is LightningDataModule"):
        data_tool.data(LightningDataModule())


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_prepared_much_faster_than_any_model_takes_them(packing: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, size=2000)
    rows = [{"input_ids": rng.integers(0, 30000, n), "trained": rng.random(n) < 0.5} for n in lengths]
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "trained": datasets.List(datasets.Value("bool"))}
    )
    table = datasets.Dataset.from_generator(lambda: iter(rows), features=features, cache_dir=str(tmp_path))
    reader, collate = DocumentReader(table), PadCollator(0, max_length=512, packed=packing)
    order = BatchOrder(lengths, 8, pack_to=512 if packing else None)
    start = time.perf_counter()
    tokens = sum(int(collate(reader.__getitems__(batch))["input_ids"].numel()) for batch in order)
    rate = tokens / (time.perf_counter() - start)
    assert rate > 50_000, f"{rate:,.0f} tokens per second"  # millions, on an idle core


# Mistakes

GOOD = chat("hello", "hi")
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', r"a.jsonl, row 2: is not UTF-8 \(character 11 of the row\)"),
        ("a.json", b'[{"text": "ok"}, {"text": "\xff"}]', r"a.json, row 2: is not UTF-8"),
        ("a.json", b'[{"text": "ok"}, {"te', "a.json, row 2: is not valid JSON"),
        ("a.json", b'[{"text": "ok"} {"text": 1}]', r"a.json, row 2: is not valid JSON \(Expected ',', found '{'\)"),
        ("a.json", b'[{"text": "ok"}', "a.json, row 2: .*found 'the end of the file'"),
        ("a.jsonl", b"", "a.jsonl: has no rows"),
        ("a.json", b"[]", "a.json: has no rows"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 99)[:-9], "a.jsonl.gz: cannot be read"),
        ("a.parquet", b"PAR1, or so it says", "a.parquet: cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PaCAError, match=message):
        list(Source(str(tmp_path / name)).rows())


def test_missing_sources_say_what_to_do(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PaCAError, match=r"nowhere.jsonl: no such file \(looked for /"):
        module("nowhere.jsonl").prepare_data()
    with pytest.raises(PaCAError, match=r"is a directory, but not one that `datasets` saved"):
        module(tmp_path).prepare_data()
    datasets.DatasetDict(test=datasets.Dataset.from_list([GOOD])).save_to_disk(tmp_path / "saved")
    with pytest.raises(PaCAError, match="has no split 'train'; it has 'test'"):
        module(tmp_path / "saved").prepare_data()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(PaCAError, match=r"(?s)some/data: .*Offline, give a local file, or a directory .*save_to_disk"):
        module("some/data").prepare_data()
    with pytest.raises(PaCAError, match=r"tokenizer 'some/model': cannot be loaded .*give its directory"):
        module(tokenizer="some/model").prepare_data()


def test_a_template_that_fails_names_the_row(module: Any, tmp_path: Path) -> None:
    with_system = chat("Be kind.", "a", "b", roles=("system", "user", "assistant"))
    path = write_rows(tmp_path / "train.jsonl", [GOOD, with_system])
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + PLAIN
    with pytest.raises(PaCAError, match=r"train.jsonl, row 2: the chat template fails.*no system role here"):
        module(path, chat_template=template).prepare_data()
    with pytest.raises(PaCAError, match=r"row 1: the chat template fails.*TemplateSyntaxError"):
        module(path, chat_template="{% for %}").prepare_data()
    with pytest.raises(PaCAError, match="is neither a Jinja template nor a readable file"):
        module(path, chat_template="missing.jinja").prepare_data()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"max_length": 1}, "max_length is 1, but must be at least 2"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": 0.1, "validation": "x.jsonl"}, "validation_fraction holds out training rows"),
    ],
)
def test_a_setting_out_of_range_is_refused(module: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        module(**settings)


def test_a_split_that_would_be_empty_is_refused(module: Any) -> None:
    with pytest.raises(
        PaCAError, match=r"validation_fraction 0.01 of the 6 rows .* leaves the training or the validation"
    ):
        module(validation_fraction=0.01).setup("fit")
    data = module()
    data.setup("test")
    with pytest.raises(PaCAError, match="there is no test data: set `test`"):
        data.test_dataloader()
