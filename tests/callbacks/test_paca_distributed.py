"""PaCA on several processes: the same training as on one."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader

from paca_lightning import AdapterCheckpoint, PaCAStrategy, load_adapter, paca_layers
from tests.callbacks.test_paca import CONFIG, DATA, Module
from tests.distributed_launch import launch

pytestmark = pytest.mark.distributed


class Sharded(Module):
    """Each rank reads its own rows, so that a step sees the same 8 rows on any number of processes."""

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size
        return DataLoader(DATA[self.global_rank :: world], batch_size=8 // world)


def fit(
    directory: Path,
    *,
    epochs: int,
    devices: int = 2,
    strategy: str | DDPStrategy = "ddp",
    callbacks: tuple[Any, ...] = (),
    **arguments: Any,
) -> Module:
    module = Sharded()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[PaCAStrategy(CONFIG), AdapterCheckpoint(str(directory / "adapter")), *callbacks],
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        use_distributed_sampler=False,
    )
    trainer.fit(module, **arguments)
    return module


def spawning() -> DDPStrategy:
    """``ddp_spawn``, whose processes get everything pickled, from the server that has imported it all."""
    return DDPStrategy(start_method="forkserver")


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    module = Module()
    load_adapter(module, directory / "adapter")
    return {path: layer.paca_delta.detach() for path, layer in paca_layers(module)}


def stop_and_resume(directory: Path) -> None:
    """On each of two ranks: an epoch, and from its checkpoint another."""
    saving = ModelCheckpoint(directory, filename="first-epoch")
    fit(directory / "half", epochs=1, callbacks=(saving,))
    fit(directory / "resumed", epochs=2, ckpt_path=directory / "first-epoch.ckpt")


def test_ddp_equals_one_process_and_resumes_bitwise(tmp_path: Path) -> None:
    fit(tmp_path / "one", epochs=2, devices=1, strategy="auto")
    trained = fit(tmp_path / "two", epochs=2, strategy=spawning())
    launch(stop_and_resume, 2, tmp_path)

    one, two, resumed = (adapter(tmp_path / name) for name in ("one", "two", "resumed"))
    for path, delta in one.items():
        # Two halves of a batch are summed in another order than the whole: rounding of fp32.
        torch.testing.assert_close(two[path], delta, atol=1e-6, rtol=1e-5)
        assert torch.equal(resumed[path], two[path])
    state = torch.load(tmp_path / "first-epoch.ckpt", weights_only=True)["state_dict"]
    assert {key.rpartition(".")[2] for key in state} == {"paca_delta", "paca_indices"}

    # The module of the main process, which spawned workers cannot convert, comes back with the trained weights.
    expected = Module()
    load_adapter(expected, tmp_path / "two" / "adapter")
    assert torch.equal(trained.net[0].weight, expected.net[0].weight)

    # Another conversion of it starts from trained weights: no checkpoint fits, and the message says why.
    run = pl.Trainer(accelerator="cpu", devices=2, strategy=spawning(), callbacks=[PaCAStrategy(CONFIG)], logger=False)
    with pytest.raises(ProcessRaisedException, match="After a run in spawned processes the module of this process"):
        run.test(trained, DataLoader(DATA, batch_size=4), ckpt_path=tmp_path / "first-epoch.ckpt", verbose=False)
