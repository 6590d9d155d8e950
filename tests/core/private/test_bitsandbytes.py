"""Canaries for the private APIs of bitsandbytes."""

import bitsandbytes
import pytest
import torch
from packaging.version import Version

from paca_lightning.core.private import bitsandbytes as private
from tests.core.private.canary import canary, check_coverage

OLD = Version(bitsandbytes.__version__) < Version("0.50")


@canary("bitsandbytes.undo_cpu_packing")
@pytest.mark.skipif(OLD, reason="bitsandbytes before 0.50 does not repack weights for the CPU")
def test_undo_cpu_packing() -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, quantize_4bit

    packed, state = quantize_4bit(torch.randn(64, 128, dtype=torch.bfloat16), blocksize=64, quant_type="nf4")
    expected = packed.clone()
    repacked, state = _convert_weight_packed_for_cpu(packed, state)
    assert not torch.equal(repacked.flatten(), expected.flatten())
    restored, state = private.undo_cpu_packing(repacked, state)
    assert torch.equal(restored.flatten(), expected.flatten())
    assert tuple(state.shape) == (64, 128)


def test_every_function_has_a_canary() -> None:
    check_coverage("bitsandbytes")
