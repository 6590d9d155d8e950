"""AdapterCheckpoint: the callback that leaves an adapter directory behind."""

import hashlib
import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from paca_lightning.adapters.files import TENSORS
from paca_lightning.callbacks.averaging import Averaging
from paca_lightning.callbacks.own_directory import own_directory
from paca_lightning.callbacks.stop_signals import STOPPED
from paca_lightning.core.dtensor import is_first_rank, is_sharded
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import written_aside
from paca_lightning.layers.base import paca_layers
from paca_lightning.other_methods.adapted import adapted_model
from paca_lightning.other_methods.any_adapter import save_trained, trains_adapter


class AdapterCheckpoint(Callback):
    """Write the adapter at the end of fitting and when it is stopped, or the best adapter with ``monitor``.

    ``load_adapter``, ``PaCAStrategy(adapter=...)`` and ``paca-lightning export`` take the directory. It also holds the
    data module's ``tokenizer``, if there is one, as its chat template may differ from the base model's.

    After an error, and after a stop where the best adapter is kept, the last one is written beside it, to
    ``adapter-interrupted``. To resume a run, use Lightning's ModelCheckpoint: its files hold the adapter and the state
    of the run. What reads an adapter directory reads such a file, too. To make a directory of it, run ``fit`` with the
    same config and ``limit_train_batches=0``:
    ``paca-lightning fit --config ... --ckpt_path best.ckpt --trainer.limit_train_batches=0``. With ``fast_dev_run``,
    nothing is written.

    Args:
        dirpath: Directory to write. Default: ``adapter`` in the logger's directory.
        monitor: A validation metric, such as ``val/loss``. The adapter is written after each validation that improves
            the metric, and not at the end, so that the best one stays, on any number of devices. Without validation,
            the last step is saved. A resumed run that writes to the same directory keeps the best value so far, and
            one that has nothing left to train leaves the best adapter as it is.
        mode: Whether a ``min`` or a ``max`` of the metric is best.

    Raises:
        PaCAError: If the directory cannot be written or belongs to two of these callbacks, nothing is trained by a
            method, or in no step, the metric is not logged, or an averaging callback makes another model than the
            validated one.
    """

    def __init__(
        self, dirpath: str | None = None, monitor: str | None = None, mode: Literal["min", "max"] = "min"
    ) -> None:
        if mode not in ("min", "max"):
            raise PaCAError(f"AdapterCheckpoint: mode must be 'min' or 'max', not {mode!r}.")
        self.dirpath = dirpath
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None
        self._best_sha256: str | None = None
        self._elsewhere: str | None = None  # the best adapter of the checkpoint, if it is in another directory
        self._directory: Path | None = None
        self._trained = False

    @property
    @override
    def state_key(self) -> str:
        """Unique per instance."""
        settings = {"dirpath": self.dirpath, "monitor": self.monitor, "mode": self.mode}
        return f"{type(self).__qualname__}{settings!r}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the directory before training."""
        if stage != "fit" or _is_trial(trainer):
            return
        self.best, self._elsewhere, self._trained = None, None, False
        self._directory = own_directory(self, trainer, "adapter")
        averaging = [other for other in trainer.callbacks if isinstance(other, Averaging)]  # type: ignore[attr-defined]
        if averaging and self.monitor is not None:
            raise PaCAError(
                f"AdapterCheckpoint(monitor=...) writes the weights of the moment, and {type(averaging[0]).__name__} "
                "makes a model of averages. Leave `monitor` out: the adapter at the end is of the averages."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before training that there will be an adapter to write."""
        if not trains_adapter(pl_module):
            raise PaCAError(
                "AdapterCheckpoint has nothing to write: no layer is trained by PaCA. Add PaCAStrategy or another "
                "method's strategy."
            )

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note that this run trains. A run without batches only unpacks the adapter of a checkpoint."""
        self._trained = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter if it is the best so far."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if _is_trial(trainer):
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise PaCAError(
                f"AdapterCheckpoint(monitor={self.monitor!r}): no such metric is logged. There are {sorted(metrics)}."
            )
        value = float(metrics[self.monitor])
        sign = 1 if self.mode == "min" else -1
        better = math.isfinite(value) and (self.best is None or sign * value < sign * self.best)
        if trainer.strategy.reduce_boolean_decision(better):  # saving is collective: all ranks must agree
            self._save(trainer, pl_module)
            self.best = value
            if is_first_rank():  # the rank that wrote the file and whose state goes into a checkpoint
                self._best_sha256 = _sha256(self._directory)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter, unless the best one is there, or is elsewhere and this run had nothing to train."""
        if _is_trial(trainer):
            rank_zero_info("No adapter is written with fast_dev_run.")
            return
        if not self._trained and trainer.ckpt_path is None and not _has_moved(pl_module):
            raise PaCAError(
                "There is no adapter: this run took no step. Look at max_steps, max_epochs, max_time and "
                "limit_train_batches, and at the number of training batches."
            )
        unpacks = trainer.limit_train_batches == 0 and not self._trained  # on purpose: the checkpoint's own adapter
        if self.monitor is not None and not unpacks:
            # All ranks do as the first one, which sees the files.
            best, elsewhere = trainer.strategy.broadcast((self.best, self._elsewhere))
            if best is not None:
                rank_zero_info(f"Adapter with the best {self.monitor} ({best:.4g}): {self._directory}")
                return
            if elsewhere is not None and not self._trained:
                rank_zero_info(f"Nothing was left to train. {elsewhere}")
                return
            if self._trained:
                rank_zero_warn(
                    f"No validation gave {self.monitor!r} a value: the adapter is that of the last step, in "
                    f"{self._directory}."
                )
        self._save(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the present adapter: as the adapter if the user stops the run, beside it if there is a better one.

        After an error, or where the best adapter is kept, it goes to a directory of its own, ``adapter-interrupted``. A
        sharded adapter cannot be gathered after an error, which other ranks may not have.
        """
        stopped = isinstance(exception, STOPPED)
        if (
            _is_trial(trainer)
            or not self._trained
            or trainer.state.fn != TrainerFn.FITTING
            or not _has_moved(pl_module)
        ):
            return
        if not stopped and any(is_sharded(layer.paca_delta) for _, layer in paca_layers(pl_module)):
            return
        assert self._directory is not None
        own_name = self._directory.with_name(f"{self._directory.name}-interrupted")
        try:
            self._save(trainer, pl_module, self._directory if stopped and self.best is None else own_name)
        except (PaCAError, OSError) as error:  # such as a full disk: the exception at hand says more
            rank_zero_warn(f"The adapter could not be saved: {error}")

    @override
    def state_dict(self) -> dict[str, Any]:
        """The best value, and the directory and hash of its adapter."""
        if self.best is None:
            return {}
        return {"best": self.best, "directory": str(self._directory), "sha256": self._best_sha256}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best value if the directory still holds its adapter; tell of the best one in another directory."""
        best, directory, sha256 = state_dict["best"], state_dict["directory"], state_dict["sha256"]
        if sha256 is None or sha256 != _sha256(Path(directory)):
            return
        if directory == str(self._directory):
            self.best, self._best_sha256 = best, sha256
        else:
            self._elsewhere = f"The adapter with the best {self.monitor} so far ({best:.4g}) stays in {directory}."
            rank_zero_info(f"{self._elsewhere} This run keeps the best of its own validations.")

    def _save(self, trainer: Trainer, pl_module: LightningModule, directory: Path | None = None) -> None:
        """Write the present adapter. Default: to the directory of the best or last one."""
        directory = directory or self._directory
        assert directory is not None
        save_trained(pl_module, directory)
        tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if is_first_rank() and hasattr(tokenizer, "save_pretrained"):
            with written_aside(directory) as scratch:  # after the adapter, which a failing tokenizer must not cost
                tokenizer.save_pretrained(scratch)
        if self.monitor is None or not self._trained or directory != self._directory:
            rank_zero_info(f"Adapter: {directory}")


def _is_trial(trainer: Trainer) -> bool:
    """Whether a run only tries its code, and Lightning saves nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _has_moved(pl_module: LightningModule) -> bool:
    """Whether there is anything to save: on each rank alone, as the others may not answer."""
    if adapted_model(pl_module) is not None:
        return True
    return any(is_sharded(layer.paca_delta) or bool(layer.paca_delta.any()) for _, layer in paca_layers(pl_module))


def _sha256(directory: Path | None) -> str | None:
    """SHA-256 of an adapter's tensors; None if there are none."""
    if directory is None or not (directory / TENSORS).is_file():
        return None
    with (directory / TENSORS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
