"""Batches out of memory-mapped tokens."""

import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from paca_lightning.tasks.data.collate import DocumentReader, PadCollator
from paca_lightning.tasks.data.sampler import BatchOrder
from tests.tiny import tiny_llama


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_prepared_much_faster_than_a_tiny_model_takes_them(packing: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, size=2000)
    rows = [{"input_ids": rng.integers(0, 30000, n), "trained": rng.random(n) < 0.5} for n in lengths]
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "trained": datasets.List(datasets.Value("bool"))}
    )
    table = datasets.Dataset.from_generator(lambda: iter(rows), features=features, cache_dir=str(tmp_path))
    reader, collate = DocumentReader(table), PadCollator(0, max_length=512, packed=packing)
    order = BatchOrder(lengths, 8, pack_to=512 if packing else None)
    batches = []
    # CPU time, which other processes do not lengthen.
    preparing = cpu_seconds(lambda: batches.extend(collate(reader.__getitems__(batch)) for batch in order))
    model, ids = tiny_llama(), batches[0]["input_ids"] % 384
    _, using = (cpu_seconds(lambda: model(input_ids=ids, labels=ids).loss.backward()) for _ in range(2))
    assert len(batches) > 50
    assert preparing / len(batches) < 0.1 * using
