"""Rows of tokens are taken as they are, if they fit the tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.pretokenized import pretokenized
from tests.tasks.rows import write_rows


@pytest.mark.parametrize(
    ("row", "ids", "trained"),
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], [False, True, True]),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, [5, 6, 7], [False, False, True]),
        (
            {"input_ids": [0, 5, 6, 7, 0], "labels": [-100, 5, -100, 7, -100], "attention_mask": [0, 1, 1, 1, 0]},
            [5, 6, 7],
            [False, False, True],
        ),
    ],
)
def test_tokens_and_labels(row: dict[str, Any], ids: list[int], trained: list[bool]) -> None:
    encoded, unread = pretokenized({**row, "token_type_ids": [0] * len(row["input_ids"]), "id": 3}, 10)
    assert encoded.input_ids.tolist() == ids
    assert encoded.trained.tolist() == trained
    assert unread == ["id"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 10]}, r"'input_ids\[1\]' is 10, but the tokenizer knows 10 tokens.*another tokenizer"),
        ({"input_ids": [1, -1]}, r"'input_ids\[1\]' is -1"),
        ({"input_ids": "1 2"}, "'input_ids' is a str, expected a list of whole numbers"),
        ({"input_ids": [1, 2.5]}, "'input_ids' is a list, expected a list of whole numbers"),
        ({"input_ids": []}, "'input_ids' is missing or empty"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 entries, but 'input_ids' has 2"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"'labels\[0\]' is 2, but the token there is 1.*not be shifted"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "other numbers than 0 and 1, as for packed rows"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "0 between tokens"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PaCAError, match=message):
        pretokenized(row, 10)


def test_a_file_of_tokens_is_detected_cut_and_counted(module: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": list(range(20)), "labels": [-100] * 18 + [18, 19]}]
    path = write_rows(tmp_path / "tokens.jsonl", [*rows, {"input_ids": list(range(20))}])
    data = module(path, max_length=16)
    data.setup("fit")
    split = data.splits["train"]
    assert split.report.formats == {"tokens": 2}
    assert split.column("row").tolist() == [1, 3]
    assert split.column("truncated").tolist() == [False, True]
    assert split.dropped == 1
    write_rows(path, [*rows, {"input_ids": [10**6]}])
    with pytest.raises(PaCAError, match=r"tokens.jsonl, row 3: the field 'input_ids\[0\]' is 1000000"):
        module(path).prepare_data()
