"""The instruction data module: batches, cache, held-out rows, raw text and settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.chat import ChatEncoder
from tests.tasks.rows import FIXTURES, QUICKSTART, chat, write_rows
from tests.tiny import tiny_tokenizer


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
