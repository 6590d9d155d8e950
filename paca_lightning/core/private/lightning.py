"""Private APIs of Lightning (read in 2.6.6)."""

import functools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from torch.optim import Optimizer


def trainer_of(module: "LightningModule") -> "Trainer | None":
    """The trainer that a module is attached to; the public ``trainer`` raises where there is none."""
    return module._trainer


def should_log(trainer: "Trainer") -> bool:
    """Whether Lightning logs at this step: ``log_every_n_steps`` counts batches that stepped, which are private."""
    return trainer._logger_connector.should_update_logs


def logged_step(trainer: "Trainer") -> int:
    """The step under which Lightning logs: with several optimizers, ``global_step`` counts more."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_accumulating(trainer: "Trainer") -> bool:
    """Whether the present batch leaves its gradients for a later one: known before the batch ends by the loop alone."""
    return trainer.fit_loop._should_accumulate()


def validation_is_due(trainer: "Trainer") -> bool:
    """Whether a validation follows the present batch. Only the loop knows, from the fetcher of its batches."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return fetcher is not None and loop._should_check_val_fx(fetcher)


def remember_saved_step(callback: "ModelCheckpoint", step: int) -> None:
    """Tell a ModelCheckpoint that a step is saved: its state does not hold this, so that a resumed run saves again."""
    callback._last_global_step_saved = step


def leave_out_sigterm_broadcast(trainer: "Trainer") -> None:
    """Leave out the broadcast by which rank 0 tells at each batch whether it got SIGTERM.

    The host waits for the device in it, and no setting turns it off. The caller has to tell the ranks of signals.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def before_batch_transfer(module: "LightningModule", batch: Any) -> Any:
    """Run the hook ``on_before_batch_transfer`` of the module or of its data module, whichever has it.

    The trainer does so before ``strategy.batch_to_device``, and only a private method knows which of the two has it.
    """
    return module._on_before_batch_transfer(batch)


def restore_loader_states(trainer: "Trainer") -> None:
    """Hand a checkpoint's loader states to the train loaders, if they wait: no hook runs between the two."""
    trainer.fit_loop._load_combined_loader_states()


def spawns_workers(trainer: "Trainer") -> bool:
    """Whether training runs in processes that the trainer forks or spawns, and returns here; no flag tells."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def averaged_model(callback: "Callback") -> nn.Module | None:
    """The averaged copy of the module that a ``WeightAveraging`` callback keeps, once it has one."""
    return getattr(callback, "_average_model", None)


def pruned_modules(callback: "ModelPruning") -> "list[nn.Module]":
    """The modules that a ``ModelPruning`` callback puts masks on, once it is set up; it hands them to nobody."""
    return list(dict.fromkeys(module for module, _ in callback._parameters_to_prune))


def set_device(model: nn.Module, device: torch.device) -> None:
    """Tell LightningModules and metrics in a model their device, which is otherwise a side effect of moving them."""
    from lightning.fabric.utilities.device_dtype_mixin import _update_properties

    _update_properties(model, device=device)


def optimizers_to_device(optimizers: "Iterable[Optimizer]", device: torch.device) -> None:
    """Move optimizer states to a device, but for the step counts; PyTorch does so only when it loads a state dict."""
    from lightning.fabric.utilities.optimizer import _optimizers_to_device

    _optimizers_to_device(optimizers, device)


def accelerator_connector() -> type[Any]:
    """The class that chooses the accelerator and the strategy; Lightning has no hook for these choices."""
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    return _AcceleratorConnector


def requeue_signal(trainer: "Trainer") -> int | None:
    """The signal on which Lightning saves and requeues a SLURM job; None elsewhere. Only some strategies tell it."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def next_version(logger: "CSVLogger | TensorBoardLogger") -> int | str:
    """The version that a logger takes if it has none yet, as if it were asked for the first time."""
    logger._version = None
    return logger.version


def has_fixed_version(logger: "CSVLogger | TensorBoardLogger") -> bool:
    """Whether a logger was given its version, and does not look for a free one; asking for it would choose one."""
    return logger._version is not None


@functools.cache
def wait_before_ending_ranks(seconds: float) -> None:
    """Make Lightning's launcher wait before it kills this rank and those it started because one of them has died.

    It kills at its next look, up to 5 seconds later, also a rank that is about to say which one died. No setting turns
    that off, and no hook runs between the two.
    """
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    end_ranks = _ChildProcessObserver._terminate_all

    def wait_and_end_ranks(observer: _ChildProcessObserver) -> None:
        time.sleep(seconds)
        end_ranks(observer)

    _ChildProcessObserver._terminate_all = wait_and_end_ranks  # type: ignore[assignment, method-assign]
