"""AdapterHistory: the callback that leaves adapters along a training."""

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from paca_lightning.adapters.fingerprint import base_samples
from paca_lightning.adapters.history import History, Point
from paca_lightning.callbacks.opened_history import open_history
from paca_lightning.callbacks.own_directory import own_directory
from paca_lightning.callbacks.point_steps import PointSteps
from paca_lightning.callbacks.training_counts import TrainingCounts
from paca_lightning.core.checksums import settings_checksum
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.private.lightning import is_accumulating
from paca_lightning.other_methods.adapted import adapted_model
from paca_lightning.other_methods.any_adapter import gather_trained, trains_adapter
from paca_lightning.strategies.agreement import from_first_rank


class AdapterHistory(Callback):
    """Write an adapter every n steps, and at steps 0, 1, 2, 4, ..., as Pythia's checkpoints are (arXiv 2304.01373).

    Each is an adapter directory, ``step-00000064``, which ``load_adapter``, ``PaCAStrategy(adapter=...)``,
    ``paca-lightning generate`` and ``export`` take; beside PEFTStrategy, BottleneckStrategy and LoReFTStrategy it is
    one of their method's. Its ``point.json`` holds step, tokens, losses and the position in
    the data (:class:`~paca_lightning.adapters.history.Point`). ``paca-lightning dynamics`` looks along a history. The
    last step of a run that ends is written, too.

    A resumed run goes on with the history of its checkpoint: in the same directory if ``dirpath`` is given, otherwise
    in its own version's, which takes over the points so far. Points after the checkpoint's step, which are trained
    again, move to ``superseded``. With averaging callbacks, points hold the weights of the moment.

    Args:
        dirpath: Directory to write. Default: ``history`` in the logger's directory.
        every_n_steps: Optimizer steps between two points.
        log_spaced_to: Powers of two up to this step are points, too; 0: none. Pythia's: 512, with a point every 1000.
        metric: Name of the logged validation loss.

    Raises:
        PaCAError: If the directory cannot be written, belongs to two of these callbacks, or holds the history of
            another run, method or base model; a number is out of range; no adapter is trained; or validation does
            not log the metric.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int = 1000,
        log_spaced_to: int = 512,
        metric: str = "val/loss",
    ) -> None:
        if every_n_steps < 1 or log_spaced_to < 0:
            raise PaCAError(
                f"AdapterHistory: every_n_steps={every_n_steps} must be at least 1, and log_spaced_to={log_spaced_to} "
                "must not be negative."
            )
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.log_spaced_to = log_spaced_to
        self.metric = metric
        self._steps = PointSteps(every_n_steps, log_spaced_to)
        self._forget()

    def _forget(self) -> None:
        """Forget an earlier run."""
        self._directory = Path()
        self._before: Path | None = None  # the directory of the checkpoint's history
        self._counts = TrainingCounts()
        self._held_out: tuple[int, float | None] | None = None  # step and loss of the last validation
        self._history: History | None = None  # on the first rank, once training begins
        self._base = ""
        self._next: int | None = None  # step of the next point; None before training begins
        self._position = (0, 0)  # epoch and its batches that are done
        self._written: int | None = None

    @property
    @override
    def state_key(self) -> str:
        """Unique per instance."""
        settings = {"dirpath": self.dirpath, "every_n_steps": self.every_n_steps, "log_spaced_to": self.log_spaced_to}
        return f"{type(self).__qualname__}{settings!r}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the directory before training."""
        if stage != "fit":
            return
        self._forget()
        self._directory = own_directory(self, trainer, "history")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there will be adapters to write."""
        if not trains_adapter(pl_module):
            raise PaCAError(
                "AdapterHistory has nothing to write: no layer is trained by PaCA. Add PaCAStrategy or another "
                "method's strategy."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the history at the first batch: by then, the columns are chosen and a checkpoint is restored."""
        if self._next is None:
            self._position = (_epoch(trainer), batch_idx)
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        adapted = adapted_model(pl_module)
        samples = base_samples(pl_module) if adapted is None else adapted.base
        self._base = settings_checksum(samples)

        def opened() -> bool:
            """Open the history. Returns whether a point of the present step has to be written."""
            self._history = open_history(trainer, self._directory, self._before, adapted or samples)
            if step not in self._history.points:
                return step in self._steps
            self._catch_up(self._history.points[step])
            return False

        missing = from_first_rank(opened)
        self._next = self._steps.after(step)
        if missing:
            self._write(trainer, pl_module)
        rank_zero_info(f"Adapters along the run, at step {self._next} next: {self._directory}")

    def _catch_up(self, present: Point) -> None:
        """Know the validation that the point of the present step knows, or let it know of ours.

        A checkpoint may be from before the validation of its step, which Lightning does not repeat.
        """
        if present.held_out_step == present.step:
            self._held_out = (present.step, present.held_out_loss)
        self._note_validation(present.step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and write the adapter if its turn has come."""
        self._position = (_epoch(trainer), batch_idx + 1)
        self._counts.add(batch, outputs, stepped=not is_accumulating(trainer))
        assert self._next is not None
        if trainer.global_step >= self._next:  # several optimizers may step over it
            self._next = self._steps.after(trainer.global_step)
            self._write(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the loss, also with the point of the present step."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.metric not in trainer.callback_metrics:
            raise PaCAError(
                f"AdapterHistory(metric={self.metric!r}): validation logged no such metric, but "
                f"{sorted(trainer.callback_metrics)}."
            )
        if trainer.sanity_checking and (trainer.global_step or math.isfinite(trainer.num_sanity_val_steps)):
            return  # of a few batches, or of a step that was validated before the run was resumed
        loss = float(trainer.callback_metrics[self.metric])
        self._held_out = (trainer.global_step, loss if math.isfinite(loss) else None)
        if self._next is not None:
            from_first_rank(lambda: self._note_validation(trainer.global_step))

    def _note_validation(self, step: int) -> None:
        """Add the last validation to the point of its step, if both are of this one. On the first rank alone."""
        assert self._history is not None
        if step in self._history.points and self._held_out and self._held_out[0] == step:
            self._history.update(step, held_out_loss=self._held_out[1], held_out_step=step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step."""
        if self._next is not None and self._written != trainer.global_step:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the present point. Collective."""
        self._counts.gather()
        step, (epoch, batch) = trainer.global_step, self._position
        held_out_step, held_out_loss = self._held_out or (None, None)
        point = Point(
            step=step,
            tokens=self._counts.tokens,
            train_loss=self._counts.take_mean_loss(),
            held_out_loss=held_out_loss,
            held_out_step=held_out_step,
            epoch=epoch,
            batch=batch,
            base=self._base,
        )
        write = gather_trained(pl_module)

        def add() -> None:
            assert self._history is not None
            self._history.add(point, write)

        from_first_rank(add)
        self._written = step

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what is counted and where the history is. Collective, as saving is."""
        self._counts.gather()
        own = {"counts": self._counts.state_dict(), "held_out": self._held_out, "directory": str(self._directory)}
        checkpoint["callbacks"][self.state_key] = own

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, and remember where the history is."""
        self._counts.load_state_dict(state_dict["counts"])
        self._held_out = None if state_dict["held_out"] is None else tuple(state_dict["held_out"])
        self._before = Path(state_dict["directory"])


def _epoch(trainer: Trainer) -> int:
    """The epoch by the loader's own count, if it has one: Lightning's is ahead after ``max_steps`` ended an epoch."""
    return int(getattr(trainer.train_dataloader, "epoch", trainer.current_epoch))
