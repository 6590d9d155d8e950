"""StopSignals: Ctrl-C, SIGTERM, SIGHUP and SLURM's requeue signal act between two steps, on all ranks alike."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from paca_lightning.core.private.lightning import (
    is_accumulating,
    leave_out_sigterm_broadcast,
    remember_saved_step,
    requeue_signal,
    validation_is_due,
)
from paca_lightning.strategies.agreement import end_group, highest, host_group

FILE_NAME = "interrupted.ckpt"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = (KeyboardInterrupt, SIGTERMException)
"""What is raised in a run that someone stopped, as opposed to one that failed."""


class StopSignals(Callback):
    """Stop a run on Ctrl-C, SIGTERM or SIGHUP after its present optimizer step, with a checkpoint to resume from.

    The checkpoint ``interrupted.ckpt`` is written where ModelCheckpoint writes. Resumed from it, a run goes on as if it
    had not been stopped. A second signal stops at once, without it. The process exits with 130 (by the command line),
    143 or 129. A closed terminal sends SIGHUP, sometimes twice; what is written to it then is dropped.

    Several processes agree after each batch, so that all stop at the same one, whichever got the signal. They reduce
    one number in host memory, so that no host waits for its device. Lightning's own broadcast of SIGTERM, for which
    the host waits at each batch, is left out.

    SLURM's requeue signal waits for the end of the step too; then Lightning's own handler saves and requeues the job.

    A run that is resumed from a checkpoint between a step and its validation validates first: Lightning would leave
    that validation out, and with it perhaps the best adapter.

    The command line adds this callback, as the last one.
    """

    def __init__(self) -> None:
        self._received = 0
        self._waits = False  # whether a signal waits for the end of a step, as it does during training
        self._accumulating = False  # whether gradients wait for further batches, perhaps during a validation
        self._consistent = False
        self._unvalidated = False  # whether a validation that is due after this batch is still to come
        self._requeue: tuple[int, Callable[[int, FrameType | None], Any]] | None = None
        self._group: dist.ProcessGroup | None = None  # of all ranks, in host memory; None in a run of one process

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the signals of an earlier run, and join the group in which ranks agree."""
        self._received, self._requeue = 0, None
        self._waits = self._accumulating = self._consistent = self._unvalidated = False
        self._group = host_group()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the group in which ranks agree."""
        end_group(self._group)
        self._group = None

    def _install(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handlers, which it has just set, and which its teardown takes away."""
        if trainer.received_sigterm:  # before these handlers were there
            self._received = signal.SIGTERM
        if threading.current_thread() is not threading.main_thread():
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            again = self._received in STOP_SIGNALS
            if number == signal.SIGHUP:
                _leave_closed_terminal()
                if again:  # the kernel and the shell may send one each
                    return
            self._received = number
            requeue = self._requeue is not None and number == self._requeue[0]
            at_once = trainer.world_size == 1 and not self._waits
            if not requeue and (again or at_once):
                self._stop(number, consistent=at_once)

        requeues = requeue_signal(trainer)
        if requeues is not None and callable(handler := signal.getsignal(requeues)):
            self._requeue = (requeues, handler)
            signal.signal(requeues, on_signal)
        for number in STOP_SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN  # by nohup, and by shells for jobs in the background
            if not ignored and number != requeues:
                signal.signal(number, on_signal)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers."""
        self._install(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers, if there was no sanity check, and let a resumed run not save its first step again.

        ModelCheckpoint would do so in the middle of the accumulation of the next step, and lose its gradients.
        """
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and trainer.global_step > 0:
                remember_saved_step(callback, trainer.global_step)
        if not self._is_installed():
            self._install(trainer)
        if self._group is not None:
            leave_out_sigterm_broadcast(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals act at once, and install the handlers outside ``fit``."""
        self._waits, self._unvalidated = self._accumulating, False
        if trainer.state.fn != TrainerFn.FITTING:
            self._install(trainer)

    on_test_start = on_predict_start = on_validation_start

    @staticmethod
    def _is_installed() -> bool:
        return getattr(signal.getsignal(signal.SIGTERM), "__module__", None) == __name__

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on, signals wait for the end of a step: between two batches, the loader may be ahead."""
        self._waits = True

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Act on a signal, unless gradients of an incomplete step would be lost."""
        self._accumulating = is_accumulating(trainer)
        self._unvalidated = validation_is_due(trainer)
        self._act(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals wait again, while ModelCheckpoint saves and training goes on."""
        self._waits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals act at once."""
        self._waits = False

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Act on a signal."""
        self._act(trainer)

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Act on a signal."""
        self._act(trainer)

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Act on a signal."""
        self._act(trainer)

    def _act(self, trainer: Trainer) -> None:
        """Stop or requeue if one of the ranks has received a signal and nothing would be lost."""
        if self._accumulating:
            return
        received = self._received
        if self._group is not None:
            received = int(highest(torch.tensor(received), self._group))
        if not received:
            return
        if self._requeue is None or received != self._requeue[0]:
            self._stop(received, consistent=True)
        self._received = 0
        self._requeue[1](received, None)

    def _stop(self, number: int, *, consistent: bool) -> NoReturn:
        self._consistent = consistent
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        rank_zero_info(f"Received {signal.Signals(number).name}: stopping.")
        raise SIGTERMException(128 + number)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the checkpoint of a run that was stopped between two steps."""
        trained = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and trainer.global_step > 0
        saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        if not isinstance(exception, STOPPED) or not self._consistent or not trained or not saving:
            return
        path = f"{saving[0].dirpath}/{FILE_NAME}"  # the directory may be a URL
        trainer.save_checkpoint(path)
        rank_zero_info(f"Checkpoint to resume from: {path}")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that a validation that is due or was stopped has to begin anew: no checkpoint holds its metrics."""
        if self._unvalidated or (self._consistent and trainer.validating):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for part in ("total", "current"):  # as in the first batch: Lightning goes back into the validation
                progress[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["is_last_batch"] = False


def _leave_closed_terminal() -> None:
    """Drop what is written to a terminal that is gone: a progress bar would fail before the checkpoint is written."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream)
