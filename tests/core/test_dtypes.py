"""Each dtype has two names."""

import pytest
import torch

from paca_lightning.core.dtypes import LONG, long_dtype, short_dtype


@pytest.mark.parametrize("short", LONG)
def test_both_names_are_of_one_dtype(short: str) -> None:
    long = long_dtype(short)
    assert isinstance(getattr(torch, long), torch.dtype)
    assert (long_dtype(long), short_dtype(long), short_dtype(short)) == (long, short, short)
    assert long_dtype("auto") == short_dtype("auto") == "auto"
