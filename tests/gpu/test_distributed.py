"""FSDP2 on GPUs: on one device, over NCCL where there are two, with offload, against one process."""

from pathlib import Path

import pytest
import torch

from tests.distributed_launch import launch
from tests.distributed_training import Run, train

pytestmark = [pytest.mark.cuda_only, pytest.mark.distributed]


def on_gpus(ranks: int) -> dict[str, object]:
    return {"accelerator": "gpu", "devices": ranks}


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offload"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_sharded_equals_one_process(ranks: int, offload: bool, tmp_path: Path) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    expected = train(Run(trainer=on_gpus(1)))
    strategy = {"cpu_offload": True} if offload else {}
    for found in launch(train, ranks, Run(trainer=on_gpus(ranks), strategy=strategy)):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        for path, delta in expected["deltas"].items():
            torch.testing.assert_close(found["deltas"][path], delta, rtol=1e-3, atol=1e-4)
