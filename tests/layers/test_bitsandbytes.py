"""bitsandbytes is loaded at first use, its levels in fp32, and its version checked for Gaudi."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from paca_lightning import PaCAError
from paca_lightning.layers.bitsandbytes import check_hpu_backend
from paca_lightning.layers.nf4 import dequantize_rows, quantize_rows
from tests.distributed_launch import launch
from tests.layers.reference import reference

# Close enough together to tell rounded levels from exact ones; the largest of each block is 1.
WEIGHT = torch.linspace(-1, 1, 8192, dtype=torch.float32).view(64, 128).index_fill(1, torch.tensor([0, 64]), 1.0)


@pytest.mark.parametrize("version", ["0.46.1", "0.45.0.dev0"])
def test_a_bitsandbytes_without_operators_for_gaudi_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", version)
    for _ in range(2):
        with pytest.raises(PaCAError, match=rf"bitsandbytes {version} has no NF4 .*'bitsandbytes>=0.47,<=0.49.2'"):
            check_hpu_backend()


def test_a_newer_bitsandbytes_than_recommended_for_gaudi_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", "0.51.0")
    with pytest.warns(UserWarning, match=r"bitsandbytes 0.51.0 is newer than is recommended"):
        check_hpu_backend()
    check_hpu_backend()  # a second warning would be an error here


@pytest.mark.parametrize(("version", "rank"), [("0.47.0", "0"), ("0.49.2", "0"), ("0.52.0", "1")])
def test_other_versions_and_other_ranks_are_silent(version: str, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", version)
    monkeypatch.setenv("LOCAL_RANK", rank)
    check_hpu_backend()  # a warning would be an error here


def weights_restored_under_bf16() -> Tensor:
    torch.set_default_dtype(torch.bfloat16)
    packed, absmax = quantize_rows(WEIGHT)
    return dequantize_rows(packed, (absmax,), 128, torch.float32)


@pytest.mark.distributed
def test_levels_do_not_depend_on_the_default_dtype_of_their_first_use() -> None:
    """Lightning's bf16-true makes bf16 the default, and bitsandbytes keeps the levels that it made first."""
    (restored,) = launch(weights_restored_under_bf16, 1)
    assert torch.equal(restored, reference(WEIGHT)[2])
