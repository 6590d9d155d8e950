"""Packing: few rows, every document once, and the same logits as without."""

import cProfile

import numpy as np
import pytest
import torch

from paca_lightning.tasks.data.batch import one_row
from paca_lightning.tasks.data.collate import Documents, PadCollator
from paca_lightning.tasks.data.packing import Packing, best_fit_decreasing
from paca_lightning.tasks.loss import CausalLMLoss
from tests.tiny import tiny_llama


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The textbook loop: the total of each pack."""
    room: list[int] = []
    for length in lengths:
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return sorted(capacity - left for left in room)


@pytest.mark.parametrize("seed", range(20))
def test_groups_of_equal_lengths_are_packed_as_the_textbook_loop_packs_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    lengths = np.sort(rng.integers(1, capacity + 1, size=int(rng.integers(1, 300))))[::-1]

    packs = best_fit_decreasing(lengths, capacity)

    totals = np.bincount(packs, weights=lengths)
    assert totals.min() > 0
    assert sorted(totals) == naive_best_fit_decreasing(lengths.tolist(), capacity)


def test_every_draw_uses_every_document_once_and_fills_the_same_packs() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, size=1000)
    packing = Packing(lengths, 128)
    plans = []
    for epoch in range(2):
        documents = packing.draw(np.random.default_rng(epoch))
        assert sorted(documents) == list(range(1000))
        totals = np.add.reduceat(lengths[documents], np.cumsum(packing.sizes) - packing.sizes)
        assert totals.max() <= 128
        plans.append((documents.tolist(), totals.tolist()))
    assert plans[0][1] == plans[1][1]
    assert plans[0][0] != plans[1][0]
    assert lengths.sum() / (len(packing) * 128) > 0.98


def test_a_million_documents_are_packed_in_hardly_more_steps_than_ten_thousand() -> None:
    calls = []
    for documents in (10_000, 1_000_000):
        lengths = np.random.default_rng(0).integers(1, 2049, size=documents)
        with cProfile.Profile() as profile:
            packing = Packing(lengths, 2048)
        calls.append(sum(entry.callcount for entry in profile.getstats()))
        assert lengths.sum() / (len(packing) * 2048) > 0.99
    assert calls[1] < 3 * calls[0]


def documents(lengths: list[int], per_row: list[int], seed: int = 0) -> Documents:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    trained = rng.random(total) < 0.7
    trained[np.cumsum(lengths) - lengths] = False  # as tokenization leaves it
    return Documents(rng.integers(3, 350, total), trained, np.array(lengths), np.array(per_row))


def test_a_packed_batch_restarts_positions_with_every_document_and_with_the_padding() -> None:
    batch = PadCollator(pad_token_id=2, pad_to_multiple_of=4, packed=True)(documents([3, 2, 1, 7], [3, 1]))
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert batch["input_ids"][0, 6:].tolist() == [2, 2]
    assert batch["labels"][0, [0, 3, 5, 6, 7]].tolist() == [-100] * 5


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-12), ("eager", 1e-6)])  # eager's softmax is fp32
def test_packed_logits_equal_unpacked_ones(attention: str, tolerance: float) -> None:
    """Two packed rows of unequal fill against the same documents one by one, in float64."""
    model = tiny_llama(attn_implementation=attention).double().eval()
    packed = documents([9, 5, 1, 4, 12, 3], [4, 2])
    batch = PadCollator(pad_token_id=2, packed=True)(packed)
    starts = np.cumsum(packed.lengths) - packed.lengths
    places = [(0, 0), (0, 9), (0, 14), (0, 15), (1, 0), (1, 12)]

    def logits(input_ids: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=input_ids, use_cache=False, **positions).logits

    together = logits(batch["input_ids"], position_ids=batch["position_ids"])
    leaking = logits(batch["input_ids"])
    for (row, column), start, length in zip(places, starts, packed.lengths, strict=True):
        alone = logits(torch.from_numpy(packed.input_ids[start : start + length])[None])[0]
        torch.testing.assert_close(together[row, column : column + length], alone, rtol=0, atol=tolerance)
        if column:  # what the comparison would see if attention crossed documents
            assert (leaking[row, column : column + length] - alone).abs().max() > 1e-3


def test_packed_rows_in_one_row_are_the_same_computation() -> None:
    """What flash kernels need, which keep documents apart in a single row only."""
    model = tiny_llama().double().eval()
    batch = PadCollator(pad_token_id=2, packed=True)(documents([9, 5, 1, 4, 12, 3], [4, 2]))
    flat = one_row(batch)
    assert flat["input_ids"].shape == (1, batch["input_ids"].numel())
    loss = CausalLMLoss()
    two, tokens = loss(model, {name: batch[name] for name in ("input_ids", "position_ids")}, batch["labels"])
    one, same_tokens = loss(model, {name: flat[name] for name in ("input_ids", "position_ids")}, flat["labels"])
    assert tokens == same_tokens
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_a_padded_batch_has_a_mask_only_if_it_has_padding() -> None:
    collate = PadCollator(pad_token_id=2, pad_to_multiple_of=8, max_length=12)
    padded = collate(documents([9, 11], [1, 1]))
    assert padded["input_ids"].shape == (2, 12)  # not 16: max_length comes first
    assert padded["attention_mask"].sum(1).tolist() == [9, 11]
    assert (padded["labels"][0, 9:] == -100).all()
    assert padded["input_ids"].dtype == padded["labels"].dtype == padded["attention_mask"].dtype == torch.int64
    assert "attention_mask" not in collate(documents([8, 8], [1, 1]))
