"""Choosing columns by the first batches of a run's own training data."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from paca_lightning.config import PaCAConfig
from paca_lightning.conversion import select_columns
from paca_lightning.errors import PaCAError

BATCHES = 8


def select_on_training_data(
    trainer: Trainer, pl_module: LightningModule, config: PaCAConfig, undecided: set[str]
) -> None:
    """Move layers to the columns that the first training batches favour, the same on every rank.

    Runs ``training_step`` on up to 8 batches of each rank's loader, without logging and without an optimizer step.
    The loader's position and the random state are as before.

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

    def step(batch: Any) -> Any:
        batch = trainer.strategy.batch_to_device(batch)
        with trainer.precision_plugin.train_step_context():
            return pl_module.training_step(batch, 0)

    with isolate_rng(), _unlogged(pl_module), _unsynchronised(trainer), _rewound(trainer) as loader:
        select_columns(
            pl_module,
            config,
            islice(loader, BATCHES),
            undecided,
            step=step,
            reduce=lambda score: _summed(trainer, score),
        )


def _summed(trainer: Trainer, score: Tensor) -> Tensor:
    result = trainer.strategy.reduce(score, reduce_op="sum")
    assert isinstance(result, Tensor)
    return result


def _unsynchronised(trainer: Trainer) -> AbstractContextManager[None]:
    """These backwards pass the distributed wrapper by: its gradient hooks must not wait for other ranks."""
    strategy = trainer.strategy
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


@contextmanager
def _rewound(trainer: Trainer) -> Iterator[Any]:
    loader: Any = trainer.train_dataloader
    state = loader.state_dict() if hasattr(loader, "state_dict") else None
    yield loader
    if state is not None:
        loader.load_state_dict(state)


@contextmanager
def _unlogged(pl_module: LightningModule) -> Iterator[None]:
    """Make ``self.log`` and ``self.log_dict`` do nothing: these batches are no part of training."""
    pl_module.log = pl_module.log_dict = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del pl_module.log, pl_module.log_dict
