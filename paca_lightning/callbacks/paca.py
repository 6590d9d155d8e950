"""PaCAStrategy: the callback that brings PaCA to any LightningModule."""

from typing import Any, Literal

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from paca_lightning.adapters.checkpoint import note_adapter
from paca_lightning.adapters.state_dict import keep_everything
from paca_lightning.callbacks.averaging import check_order, copies_without_asking, correct_averages
from paca_lightning.callbacks.checkpoint_compatibility import (
    check_checkpoint,
    check_restored_base,
    check_scalings,
    columns_are_chosen,
    saved_base,
    scalings,
)
from paca_lightning.callbacks.disabling import DisablesPaCA
from paca_lightning.callbacks.finite_steps import FiniteSteps
from paca_lightning.callbacks.found_rates import apply_to_found_rates
from paca_lightning.callbacks.life_cycle import (
    attach_optimizers,
    choose_columns,
    config_beside_adapter,
    convert_module,
    keep_state,
    load_waiting_adapter,
    present_conversion,
    settle_restored_columns,
)
from paca_lightning.callbacks.method_hooks import MethodHooks
from paca_lightning.callbacks.monitors import check_monitors, check_validation_comes
from paca_lightning.callbacks.resumed_optimizers import ResumedOptimizers, saved_optimizers
from paca_lightning.callbacks.run_checks import (
    check_deltas_moved,
    check_strategy,
    check_validation_interval,
    delta_sums,
    known_at_start,
    learning_rate,
    prepare_files,
)
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.private.lightning import logged_step, should_log, spawns_workers


class PaCAStrategy(FiniteSteps, DisablesPaCA):
    """Train some input columns of each frozen weight instead of the whole model (PaCA, arXiv 2503.01905).

    Add it to a Trainer's callbacks, with any LightningModule whose optimizer takes
    ``[p for p in self.parameters() if p.requires_grad]``. It converts the target layers when a run starts, writes the
    trained columns back after every optimizer step, logs ``paca/scaled_lr``, and keeps frozen weights out of
    checkpoints.

    It is a *callback*: it goes to ``Trainer(callbacks=...)``, not to ``Trainer(strategy=...)``, and works beside the
    strategies that distribute a run. ``disable()`` is a context in which the model is the base model.

    Args:
        config: What to train. Default: the settings of the adapter, or 16 columns of every linear layer but the
            output head.
        adapter: A trained adapter to start from, or to evaluate: its directory, or a checkpoint of a run.
        full_checkpoints: Keep the base weights in checkpoints. Default: only what is trained.
        nonfinite: At NaN or Inf in the loss or a gradient, ``stop`` the run or ``skip`` the step.
        resume_lr: A resumed run keeps the learning rate of its ``checkpoint``, or takes that of the ``config``: the
            present rate is multiplied by new / old, and the schedule goes on from there.

    Attributes:
        report: What was converted, once a run has started.

    Raises:
        PaCAError: If the adapter is damaged, or ``config`` contradicts it.
    """

    def __init__(
        self,
        config: PaCAConfig | None = None,
        *,
        adapter: str | None = None,
        full_checkpoints: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        resume_lr: Literal["checkpoint", "config"] = "checkpoint",
    ) -> None:
        super().__init__(nonfinite)
        self.config = config_beside_adapter(config, adapter)
        self.adapter = adapter
        self.full_checkpoints = full_checkpoints
        self.report: ConversionReport | None = None
        self._handles: list[RemovableHandle] = []
        self._hooks = MethodHooks()
        self._saved_base: dict[str, list[float]] | None = None  # of the checkpoint that the run restores
        self._resumed = ResumedOptimizers(resume_lr)
        self._at_start: tuple[int, list[tuple[float, float]]] | None = None  # steps and delta_sums

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the run, and convert now or as soon as the model exists."""
        check_strategy(trainer)
        check_order(trainer, self)
        prepare_files(trainer, stage)
        # A model may be built in __init__, in its own setup hook (after this one) or in configure_model (after both).
        # Averaging callbacks call configure_model early themselves.
        self._hooks.add(pl_module, "configure_model", lambda: self._convert(trainer, pl_module))
        self._hooks.add(pl_module, "on_load_checkpoint", lambda saved: self._note_checkpoint(saved, trainer, pl_module))
        if stage == "fit":
            # Not later: a learning rate finder trains before this callback's on_fit_start.
            self._hooks.add(trainer.strategy, "setup_optimizers", lambda _: self._attach(trainer, pl_module))
            self._hooks.add(pl_module, "on_save_checkpoint", lambda _: self.check_finite(trainer, pl_module))
            # With weights only, Lightning does not call the callback's on_save_checkpoint.
            self._hooks.add(pl_module, "on_save_checkpoint", lambda checkpoint: note_adapter(checkpoint, pl_module))
            if copies_without_asking(trainer):
                pl_module.configure_model()

    def _note_checkpoint(self, checkpoint: dict[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
        check_checkpoint(checkpoint, pl_module, resumes=trainer.state.fn == TrainerFn.FITTING)
        self._saved_base = saved_base(checkpoint)
        own = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._resumed.note_saved(own)
        present_conversion(pl_module).columns_restored = own.get("selected", True)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handles += attach_optimizers(trainer, pl_module)
        self._resumed.check_optimizers(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove our hooks; the model stays converted."""
        self._remove_hooks()
        if spawns_workers(trainer) and not self.full_checkpoints:
            # Spawned workers send their state to the module of the main process, which is not converted. With the
            # whole state it becomes the merged model; with the adapter alone it would silently stay untrained.
            keep_everything(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove our hooks after an error, when there is no teardown."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._forget_steps()
        self._hooks.remove()
        self._saved_base = self._at_start = None
        self._resumed.forget()
        while self._handles:
            self._handles.pop().remove()

    def _convert(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report, self._converted = convert_module(trainer, pl_module, self.config, self.adapter), pl_module
        keep_state(pl_module, self.full_checkpoints)
        load_waiting_adapter(pl_module, self.adapter)

    def _prepare_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what the conversion could not do yet: weights may have come after it."""
        if trainer.state.fn == TrainerFn.FITTING:
            return
        check_restored_base(self._saved_base, trainer, pl_module)
        if trainer.ckpt_path is None:
            load_waiting_adapter(pl_module, self.adapter)
        if settle_restored_columns(pl_module, self.config):
            keep_state(pl_module, self.full_checkpoints)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the base model with the checkpoint's, and load an adapter that had to wait."""
        check_restored_base(self._saved_base, trainer, pl_module)
        load_waiting_adapter(pl_module, self.adapter)
        check_validation_interval(trainer)
        self._resumed.note_configured(trainer)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary, now that a checkpoint is restored."""
        self._print_report(trainer)

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of monitored metrics."""
        check_monitors(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the columns by the first training batches, if the selection looks at data."""
        self._print_report(trainer)
        check_validation_comes(trainer)
        if choose_columns(trainer, pl_module, self.config):
            keep_state(pl_module, self.full_checkpoints)
        self._at_start = (trainer.global_step, delta_sums(pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log ``scaling * lr``, Adam's step on a column, where LearningRateMonitor logs the learning rate."""
        if trainer.loggers and should_log(trainer) and (rate := learning_rate(trainer, "lr")) is not None:
            assert self.report is not None
            scaled_lr = rate * max(layer.scaling for layer in self.report.layers)
            for logger in trainer.loggers:
                logger.log_metrics({"paca/scaled_lr": scaled_lr}, step=logged_step(trainer))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load an adapter that had to wait, and correct averaged models before they are swapped in."""
        self._prepare_evaluation(trainer, pl_module)
        correct_averages(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load an adapter that had to wait."""
        self._prepare_evaluation(trainer, pl_module)

    on_predict_start = on_test_start

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that something was trained, and correct averaged models before they are taken over."""
        super().on_train_end(trainer, pl_module)
        if self._at_start is not None and trainer.global_step > self._at_start[0]:
            check_deltas_moved(trainer, pl_module, self._at_start[1])
        correct_averages(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct averaged models before they are saved, and note the adapter and whether columns are chosen."""
        correct_averages(trainer, pl_module)
        own = checkpoint["callbacks"][self.state_key]
        own |= {"selected": columns_are_chosen(pl_module)} | saved_optimizers(trainer)
        note_adapter(checkpoint, pl_module)  # here, too, for checkpoints that are saved after the run

    @override
    def state_dict(self) -> dict[str, Any]:
        """The settings and each layer's scaling, which a checkpoint of deltas alone does not tell."""
        return {"scaling": scalings(self.report), "config": self.config.to_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose deltas would enter the weights with another scaling."""
        check_scalings(state_dict["scaling"], scalings(self.report))

    def _print_report(self, trainer: Trainer) -> None:
        """Compare the base model, which some strategies restore only now, and print the summary; once a run."""
        assert self.report is not None
        if self._resumed.settle(trainer):
            check_restored_base(self._saved_base, trainer, trainer.lightning_module)
            apply_to_found_rates(trainer, self.config.norms_lr)
            rank_zero_only(rich.print)(known_at_start(self.report, trainer))
