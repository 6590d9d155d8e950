"""Streams of training data: every row once a round, bounded memory, and the same batches after a stop."""

import gzip
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.records import Source
from paca_lightning.tasks.data.stream import DocumentStream, Position, StreamedBatch
from tests.distributed_launch import launch
from tests.tasks.data.test_loader import Bigram, assert_same_run, fit
from tests.tasks.rows import chat, write_rows

Made = list[StreamedBatch]
ROWS = [chat("q" * (i % 7 + 1), f"Answer {i}.") for i in range(50)]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def built(data: Any) -> DocumentStream:
    return data.train_dataloader().stream


def first_round(stream: DocumentStream, reader: int = 0, readers: int = 1) -> Made:
    made: Made = []
    for streamed in stream.batches(reader, readers):
        if streamed.position.round:
            return made
        made.append(streamed)
    raise AssertionError("the stream ended")


def sequences(made: Made) -> Counter[tuple[int, ...]]:
    """The tokens of each document: those of a packed row are told apart by their positions."""
    found: Counter[tuple[int, ...]] = Counter()
    for streamed in made:
        batch = streamed.batch
        for row, ids in enumerate(batch["input_ids"]):
            if "position_ids" in batch:
                starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), len(ids)]
                found.update(tuple(ids[a:b].tolist()) for a, b in pairwise(starts))
            else:
                used = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else len(ids)
                found[tuple(ids[:used].tolist())] += 1
    return found


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_round_has_the_rows_that_are_trained_without_streaming(
    module: Any, rows_file: Path, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / f"other.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=9)
    elif kind == "jsonl.zst":
        with pa.CompressedOutputStream(str(file), "zstd") as out:
            out.write(rows_file.read_bytes())
    else:
        file.write_bytes(gzip.compress(rows_file.read_bytes()) if kind == "jsonl.gz" else rows_file.read_bytes())
    plain = module(rows_file)
    plain.setup("fit")
    whole = Counter(tuple(ids) for ids in plain.splits["train"].dataset["input_ids"])
    assert len(whole) == len(ROWS)
    assert sequences(first_round(built(module(file, streaming=True, shuffle_buffer=16)))) == whole


@pytest.mark.parametrize("packing", [False, True])
def test_two_ranks_with_two_workers_share_the_rows(module: Any, rows_file: Path, packing: bool) -> None:
    stream = built(module(rows_file, streaming=True, shuffle_buffer=16, packing=packing, pad_to_multiple_of=1))
    shares = [sequences(first_round(stream, reader, 4)) for reader in range(4)]
    everything = sequences(first_round(stream))
    if packing:  # the padding of a packed row counts positions anew; rows have their own tokens
        texts = {ids for ids in everything if len(set(ids)) > 1}
        assert {ids for share in shares for ids in share if len(set(ids)) > 1} == texts
    else:
        assert sum(shares, Counter()) == everything
    assert all(shares)


def test_the_order_differs_between_rounds_and_seeds(module: Any, rows_file: Path) -> None:
    def order(round: int, seed: int) -> list[list[int]]:
        stream = built(module(rows_file, streaming=True, seed=seed))
        batches = stream.batches(start=Position(round))
        return [ids for streamed in islice(batches, 13) for ids in streamed.batch["input_ids"].tolist()]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_a_stream_goes_on_bitwise_from_any_position(module: Any, rows_file: Path) -> None:
    stream = built(module(rows_file, streaming=True, shuffle_buffer=16, packing=True, max_length=64))
    whole = list(islice(stream.batches(1, 2), 30))
    assert whole[-1].position.round > 0
    for stop in range(0, 25, 4):
        resumed = islice(stream.batches(1, 2, whole[stop].position), 5)
        for one, other in zip(resumed, whole[stop + 1 : stop + 6], strict=True):
            assert one.position == other.position
            assert all(torch.equal(one.batch[name], other.batch[name]) for name in other.batch)


def test_no_more_rows_than_a_block_are_alive(module: Any, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Row(dict[str, Any]):
        """A row that can be referred to weakly."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def read(self: Source) -> Iterator[tuple[int, Any]]:
        nonlocal most
        for number in range(1, 401):
            row = Row(chat("q", f"Answer {number}."))
            alive.add(row)
            most = max(most, len(alive))
            yield number, row

    monkeypatch.setattr(Source, "read", read)
    first_round(built(module(rows_file, streaming=True, shuffle_buffer=20)))
    assert 20 <= most <= 45  # a block, the one before it until its batches are made, and the row at hand


def test_bad_rows_are_named_by_file_and_line_or_dropped(module: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "bad.jsonl", [*ROWS[:30], "{broken", *ROWS[30:]])
    with pytest.raises(PaCAError, match=r"bad\.jsonl, row 31: is not valid JSON"):
        first_round(built(module(file, streaming=True, shuffle_buffer=10)))
    made = first_round(built(module(file, streaming=True, shuffle_buffer=10, on_bad_row="drop")))
    assert sequences(made).total() == len(ROWS)
    assert next(row for streamed in made for row in streamed.dropped).startswith(f"{file}, row 31: ")


def test_a_reader_without_a_row_does_not_read_for_ever(module: Any, tmp_path: Path) -> None:
    stream = built(module(write_rows(tmp_path / "one.jsonl", ROWS[:1]), streaming=True))
    with pytest.raises(PaCAError, match="none of the rows that reader 2 of 2 takes"):
        next(stream.batches(1, 2))


@pytest.mark.parametrize("setting", [{"validation_fraction": 0.1}, {"max_samples": 5}, {"num_proc": 2}])
def test_settings_that_need_all_rows_are_refused(module: Any, setting: dict[str, Any]) -> None:
    with pytest.raises(PaCAError, match=f"streaming: true does not go with {next(iter(setting))}"):
        module(streaming=True, **setting)


def test_sources_that_cannot_be_streamed_are_refused(module: Any, rows_file: Path, tmp_path: Path) -> None:
    settings = module(rows_file, streaming=True).hparams
    weighted = type(module())(**settings | {"train": [{"location": str(rows_file), "weight": 2}]})
    with pytest.raises(PaCAError, match="weight is 2"):
        weighted.prepare_data()
    message = {"message_id": "a", "message_tree_id": "a", "parent_id": None, "role": "prompter", "text": "hi"}
    trees = write_rows(tmp_path / "trees.jsonl", [message])
    with pytest.raises(PaCAError, match="need all rows at once"):
        module(trees, streaming=True).prepare_data()


def test_unread_fields_of_the_first_rows_are_told(
    module: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [row | {"mood": "good"} for row in ROWS])
    with caplog.at_level("INFO"):
        module(file, streaming=True).prepare_data()
    assert "mood (50)" in caplog.text
    assert "the rest is streamed" in caplog.text


def settings_of(module: Any, file: Path, **settings: Any) -> dict[str, Any]:
    return dict(module(file, streaming=True, shuffle_buffer=12, batch_size=2, **settings).hparams)


@pytest.mark.parametrize("limits", [{"max_epochs": 1}, {"max_epochs": 1, "limit_train_batches": 0.5}])
def test_a_run_without_an_end_is_refused(module: Any, rows_file: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(PaCAError, match="has no end of its own"):
        fit(settings_of(module, rows_file), **limits)


def test_overfitting_a_stream_is_refused(module: Any, rows_file: Path) -> None:
    with pytest.raises(PaCAError, match="overfit_batches"):
        fit(settings_of(module, rows_file), overfit_batches=2, max_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 5}, {"limit_train_batches": 3}])
def test_a_stopped_run_goes_on_bitwise(
    module: Any, rows_file: Path, tmp_path: Path, limits: dict[str, Any], num_workers: int
) -> None:
    data = settings_of(module, rows_file, num_workers=num_workers)
    whole, _ = fit(data, max_steps=31, **limits)
    first, runner = fit(data, max_steps=15, **limits)
    runner.save_checkpoint(tmp_path / "stopped.ckpt")
    second, _ = fit(data, tmp_path / "stopped.ckpt", max_steps=31, **limits)
    assert len(whole.batches) == 31
    assert_same_run([first, second], whole)
    with pytest.raises(PaCAError, match="seed 0 -> 1"):
        fit(data | {"seed": 1}, tmp_path / "stopped.ckpt", max_steps=31, **limits)
    with pytest.raises(PaCAError, match="Set streaming: true"):
        fit(data | {"streaming": False}, tmp_path / "stopped.ckpt", max_steps=31)


def run_of_rank(data: dict[str, Any], directory: Path) -> tuple[list[Any], list[Any], list[Any]]:
    settings: dict[str, Any] = {"devices": 2, "strategy": "ddp", "limit_train_batches": 4}
    whole, _ = fit(data, max_steps=10, **settings)
    save = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    first, _ = fit(data, max_steps=6, callbacks=[save], **settings | {"enable_checkpointing": True})
    second, _ = fit(data, directory / "step=6.ckpt", Bigram(), max_steps=10, **settings)
    return whole.batches, first.batches, second.batches


@pytest.mark.distributed
def test_ranks_that_stand_at_different_places_go_on_each_at_its_own(module: Any, tmp_path: Path) -> None:
    # The first 30 rows of one rank are broken, so the ranks are in different blocks after equally many steps.
    rows = [row if i % 2 or i > 30 else "{broken" for i, row in enumerate(ROWS)]
    file = write_rows(tmp_path / "rows.jsonl", [ROWS[0], *rows[1:]])
    data = settings_of(module, file, on_bad_row="drop")
    for whole, first, second in launch(run_of_rank, 2, data, tmp_path / "saved"):
        assert len(whole) == 10
        assert first + second == whole
