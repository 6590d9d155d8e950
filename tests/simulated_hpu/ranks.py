"""What two simulated HPUs do together: run as ``python -m tests.simulated_hpu.ranks FOLDER``.

Lightning repeats the command for the second rank. Each checks its own results.
"""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from paca_lightning import PaCAConfig, PaCAStrategy
from paca_lightning.strategies import HPUDDPStrategy
from paca_lightning.strategies.hpu.mixins import HPUFSDP2Mixin
from tests.simulated_hpu.training import TinyModule, batches, train, trainer, whole_weights

PACA = PaCAConfig(r=4)


class HPUShardingStrategy(HPUFSDP2Mixin, ModelParallelStrategy):
    """Lightning's own FSDP2 strategy on HPUs: the least that the mixin can be put on."""


class ShardedModule(TinyModule):
    def configure_model(self) -> None:
        for unit in (self.net[0], self.net[4], self.net):
            fully_shard(unit, mesh=self.device_mesh["data_parallel"])


def ddp_and_fsdp2(folder: str) -> None:
    module = TinyModule(dropout=0)
    ddp = trainer(accelerator="hpu", devices=2)
    ddp.fit(module, batches())
    assert isinstance(ddp.strategy, HPUDDPStrategy)
    assert dist.get_backend() == "hccl"
    assert os.environ["HLS_MODULE_ID"] == os.environ["LOCAL_RANK"]
    assert module.devices == {"hpu:0"}
    reference = train("cpu", module=TinyModule(dropout=0))
    torch.testing.assert_close(whole_weights(module), whole_weights(reference), atol=1e-6, rtol=1e-5)
    assert ddp.callback_metrics["loss"].item() == pytest.approx(reference.losses[-1])  # the mean over both ranks

    rank = torch.tensor(float(dist.get_rank()), device="hpu")
    for reduction in ("mean", "avg", dist.ReduceOp.AVG):
        assert ddp.strategy.reduce(rank.clone(), reduce_op=reduction).item() == 0.5
    assert ddp.strategy.reduce(rank.clone(), reduce_op="sum").item() == 1
    assert ddp.strategy.reduce(torch.tensor([7], device="hpu"), reduce_op="mean").tolist() == [7]
    assert ddp.strategy.broadcast(os.environ["LOCAL_RANK"]) == "0"
    assert ddp.strategy.reduce_boolean_decision(True)
    with pytest.raises(RuntimeError, match="unsupported ReduceOp"):
        dist.all_reduce(rank.clone(), op=dist.ReduceOp.AVG)

    paca = TinyModule(dropout=0)
    trainer(accelerator="hpu", devices=2, callbacks=PaCAStrategy(PACA)).fit(paca, batches())
    paca_reference = train("cpu", module=TinyModule(dropout=0), callbacks=PaCAStrategy(PACA))
    torch.testing.assert_close(whole_weights(paca), whole_weights(paca_reference), atol=1e-6, rtol=1e-5)

    mixed = TinyModule()
    trainer(accelerator="hpu", devices=2, precision="bf16-mixed").fit(mixed, batches())
    assert mixed.dtypes == {torch.bfloat16}

    straight, stopped, resumed = (TinyModule(dropout=0) for _ in range(3))
    for module, epochs, checkpoint in ((stopped, 1, None), (resumed, 2, f"{folder}/first.ckpt"), (straight, 2, None)):
        run = trainer(accelerator="hpu", devices=2, max_steps=-1, max_epochs=epochs)
        run.fit(module, batches(samples=24), ckpt_path=checkpoint)
        if module is stopped:
            run.save_checkpoint(f"{folder}/first.ckpt")
    assert stopped.losses + resumed.losses == straight.losses
    assert torch.equal(whole_weights(resumed), whole_weights(straight))

    layer = fully_shard(nn.Linear(2, 2).to("hpu"), mesh=init_device_mesh("hpu", (2,)))
    with pytest.raises(RuntimeError, match="unsupported ReduceOp"):  # FSDP2's own choice is AVG
        layer(torch.ones(1, 2, device="hpu")).sum().backward()

    sharded = ShardedModule(dropout=0)
    strategy = HPUShardingStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer(accelerator="hpu", devices=2, strategy=strategy).fit(sharded, batches())
    torch.testing.assert_close(whole_weights(sharded), whole_weights(reference), atol=1e-6, rtol=1e-5)

    sharded = TinyModule(dropout=0)
    trainer(accelerator="hpu", devices=2, strategy="hpu_fsdp2", callbacks=PaCAStrategy(PACA)).fit(sharded, batches())
    torch.testing.assert_close(whole_weights(sharded), whole_weights(paca_reference), atol=1e-6, rtol=1e-5)


if __name__ == "__main__":
    ddp_and_fsdp2(sys.argv[1])
    print(f"rank {os.environ['LOCAL_RANK']} done", flush=True)
    os._exit(0)  # a gloo thread that lets go of a tensor while Python finalizes would abort the process
