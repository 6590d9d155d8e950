"""Choosing columns by the first batches of a run's own training data."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from paca_lightning.callbacks.method_hooks import replaced_methods
from paca_lightning.conversion.select import select_columns
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import before_batch_transfer
from paca_lightning.layers.base import PaCALayer

BATCHES = 8


def select_on_training_data(
    trainer: Trainer, pl_module: LightningModule, layers: Mapping[str, PaCALayer], config: PaCAConfig
) -> None:
    """Move layers to the columns that the first training batches favour, the same on every rank.

    Runs ``training_step`` on up to 8 batches of each rank's loader, without logging and without an optimizer step.
    Afterwards the random states, the loader's generators and the position of a loader with ``state_dict`` are as
    before, and the module's metrics are reset.

    Args:
        trainer: Of the run.
        pl_module: The converted module.
        layers: Its PaCA layers by path, of which those that wait for data are moved.
        config: Says by which score.

    Raises:
        PaCAError: If the module steps its optimizers itself, or has several train loaders.
    """
    if not pl_module.automatic_optimization:
        raise PaCAError(
            f"selection={config.selection!r} runs training_step on some batches, which would step the optimizers of a "
            "module with manual optimization. Call apply_paca(model, config, calibration=batches) in __init__ instead."
        )

    if isinstance(trainer.train_dataloader, (dict, list, tuple)):
        raise PaCAError(
            f"selection={config.selection!r} looks at the batches of one train loader, and this run has several. Call "
            "apply_paca(model, config, calibration=batches) in __init__ instead."
        )

    numbered = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def step(batch: Any) -> Any:
        batch = before_batch_transfer(pl_module, trainer.precision_plugin.convert_input(batch))
        batch = trainer.strategy.batch_to_device(batch)
        with trainer.precision_plugin.train_step_context():
            return pl_module.training_step(batch, 0) if numbered else pl_module.training_step(batch)

    with isolate_rng(), _logging_off(pl_module), _without_ddp_sync(trainer), _loader_state_kept(trainer) as loader:
        select_columns(
            pl_module,
            layers,
            config,
            islice(loader, BATCHES),
            step=step,
            reduce=lambda score: _summed(trainer, score),
        )
    for module in pl_module.modules():
        if isinstance(module, Metric):
            module.reset()


def _summed(trainer: Trainer, score: Tensor) -> Tensor:
    result = trainer.strategy.reduce(score, reduce_op="sum")
    assert isinstance(result, Tensor)
    return result


def _without_ddp_sync(trainer: Trainer) -> AbstractContextManager[None]:
    """Keep DDP's gradient hooks from waiting for other ranks: these backwards bypass its wrapper.

    FSDP2's hooks must run. Without them it would add these gradients to those of the first step.
    """
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()


@contextmanager
def _loader_state_kept(trainer: Trainer) -> Iterator[Any]:
    loader: Any = trainer.train_dataloader
    state = loader.state_dict() if hasattr(loader, "state_dict") else None
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in holders]
    randomness = [(generator, generator.get_state()) for generator in generators if generator is not None]
    try:
        yield loader
    finally:
        if state is not None:
            loader.load_state_dict(state)
        for generator, before in randomness:
            generator.set_state(before)


def _logging_off(pl_module: LightningModule) -> AbstractContextManager[None]:
    """Make ``self.log`` and ``self.log_dict`` do nothing: these batches are no part of training."""

    def nothing(*_: Any, **__: Any) -> None:
        """Log nothing."""

    return replaced_methods(pl_module, log=nothing, log_dict=nothing)
