"""Batches out of memory-mapped tokens."""

import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from paca_lightning.tasks.data.collate import DocumentReader, PadCollator
from paca_lightning.tasks.data.sampler import BatchOrder


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
