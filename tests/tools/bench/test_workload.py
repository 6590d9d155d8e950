"""What a step is."""

from pathlib import Path

import pytest

from paca_lightning import PaCAError
from paca_lightning.tools.bench.command import bench
from paca_lightning.tools.bench.workload import Workload
from tests.tiny import tiny_config


def test_learned_positions_bound_the_length(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "rotary")
    assert Workload(model=str(tmp_path / "rotary"), tokens=10_000).longest == float("inf")
    from transformers import GPT2Config

    GPT2Config(n_positions=32).save_pretrained(tmp_path / "learned")
    with pytest.raises(PaCAError, match="tokens=33 is more than the model's 32 positions"):
        Workload(model=str(tmp_path / "learned"), tokens=33)


@pytest.mark.parametrize(("dtype", "complaint"), [("bfloat16", "steps must be"), ("bfloat17", "dtype='bfloat17' is")])
def test_dtypes_have_long_names_too(dtype: str, complaint: str) -> None:
    with pytest.raises(PaCAError, match=complaint):  # the dtype is checked before the steps
        bench(preset="small", dtype=dtype, steps=0, device="cpu")
