"""AdapterMethodStrategy: the life cycle in a run that all methods beside PaCA share."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from paca_lightning.callbacks.averaging import check_bases, check_order, copies_without_asking
from paca_lightning.callbacks.finite_steps import FiniteSteps
from paca_lightning.callbacks.kept_precision import KeptPrecision
from paca_lightning.callbacks.method_hooks import MethodHooks
from paca_lightning.callbacks.monitors import check_monitors, check_validation_comes
from paca_lightning.callbacks.paca import PaCAStrategy
from paca_lightning.callbacks.resumed_optimizers import ResumedOptimizers, saved_optimizers
from paca_lightning.callbacks.run_checks import (
    check_moved,
    check_validation_interval,
    learning_rate,
    prepare_files,
    tensor_sums,
)
from paca_lightning.core.base_model import KeepsBaseModel
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import new_tokens_in
from paca_lightning.core.private.lightning import spawns_workers
from paca_lightning.layers.linear4bit import keep_plain_layout
from paca_lightning.other_methods.adapted import (
    AdaptedModel,
    adapted_model,
    check_settings,
    find_model,
    trained_parameters,
)
from paca_lightning.other_methods.checkpoint import keep_trained
from paca_lightning.other_methods.report import MethodReport, report_on
from paca_lightning.other_methods.same_base import check_same_base, of_frozen, weight_samples


class AdapterMethodStrategy(FiniteSteps, KeepsBaseModel):
    """Trains a method's own parameters beside a frozen model, in any LightningModule.

    The model is adapted when a run starts, as soon as it exists. Checkpoints hold what is trained and the state of the
    run. A subclass says what to adapt in :meth:`adapt`.

    Args:
        adapter: Directory of a trained adapter to start from, or to evaluate.
        path: Of the module to adapt, inside the LightningModule. Default: the Hugging Face model.
        full_checkpoints: Keep the base weights in checkpoints. Default: only what is trained.
        nonfinite: At NaN or Inf in the loss or a gradient, ``stop`` the run or ``skip`` the step.
        resume_lr: Whose learning rate a resumed run takes, ``checkpoint`` or ``config``, as in ``PaCAStrategy``.

    Attributes:
        report: What is trained, once a run has started.

    Raises:
        PaCAError: From a run: if the strategy, the precision or the optimizer cannot train the method, or the adapter
            or checkpoint does not fit.
    """

    def __init__(
        self,
        *,
        adapter: str | None = None,
        path: str | None = None,
        full_checkpoints: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        resume_lr: Literal["checkpoint", "config"] = "checkpoint",
    ) -> None:
        super().__init__(nonfinite)
        self.adapter = adapter
        self.path = path
        self.full_checkpoints = full_checkpoints
        self.report: MethodReport | None = None
        # Of the present run.
        self._adapted: AdaptedModel | None = None
        self._hooks = MethodHooks()
        self._resumed = ResumedOptimizers(resume_lr)
        self._at_start: tuple[int, list[tuple[float, float]]] | None = None  # steps, sums of what is trained

    @abstractmethod
    def adapt(self, pl_module: LightningModule) -> AdaptedModel:
        """Put the method's parameters into a module whose model is built, and freeze the rest."""

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside this context the model is the base model.

        Raises:
            PaCAError: If no run has adapted a model yet.
        """
        if self._adapted is None:
            raise PaCAError(f"{type(self).__name__}.disable: no model is adapted yet. Start a run first.")
        with self._adapted.disabled():
            yield

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the run, and adapt the model now or as soon as it exists."""
        self._check_run(trainer)
        check_order(trainer, self)
        prepare_files(trainer, stage)
        self._hooks.add(pl_module, "configure_model", lambda: self._adapt(trainer, pl_module))
        self._hooks.add(pl_module, "on_load_checkpoint", self._note_checkpoint)
        kept = KeptPrecision()
        self._hooks.add(trainer.precision_plugin, "convert_module", kept.restore, first=kept.note)
        if stage == "fit":
            self._hooks.add(pl_module, "on_save_checkpoint", lambda _: self.check_finite(trainer, pl_module))
            self._hooks.add(trainer.strategy, "setup_optimizers", lambda _: self._check_optimizers(trainer, pl_module))
            if copies_without_asking(trainer):
                pl_module.configure_model()

    def _check_run(self, trainer: Trainer) -> None:
        name, strategy, precision = type(self).__name__, trainer.strategy, trainer.precision_plugin
        if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise PaCAError(
                f"{name} does not shard a model: {type(strategy).__name__} would split the method's parameters, which "
                "are saved whole. Use strategy='auto' or 'ddp', or PaCAStrategy with strategy='paca_fsdp2'."
            )
        if spawns_workers(trainer):
            raise PaCAError(f"{name} cannot send an adapted model back from spawned processes. Use strategy='ddp'.")
        if isinstance(precision, BitsandbytesPrecision | TransformerEnginePrecision):
            raise PaCAError(
                f"{type(precision).__name__} would replace the layers of {name} too. Load the model in 4 bits, or set "
                "PEFTStrategy(quantize='nf4')."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PaCAStrategy | AdapterMethodStrategy) and other is not self:
                raise PaCAError(f"{name} and {type(other).__name__} in one run: choose one of them.")

    def adapt_base(self, pl_module: LightningModule) -> AdaptedModel:
        """Adapt a module whose model is built, with a note of its base weights."""
        samples = weight_samples(find_model(pl_module, self.path)[1])
        adapted = self.adapt(pl_module)
        keep_plain_layout(pl_module.modules())
        adapted.base = of_frozen(samples, adapted.model)
        return adapted

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        adapted = adapted_model(pl_module)
        if adapted is None:
            if new_tokens_in(pl_module) is not None:
                raise PaCAError(
                    f"{type(self).__name__} does not train the rows of new tokens. Use PaCAStrategy, or fine-tune the "
                    "whole model, without a method."
                )
            adapted = self.adapt_base(pl_module)
            if self.adapter is not None:
                adapted.start_from(self.adapter)
        check_bases(trainer, pl_module)
        keep_trained(pl_module, adapted, full_checkpoints=self.full_checkpoints)
        self._adapted = adapted
        self.report = report_on(adapted.method, pl_module, adapted.notes)

    def _note_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        if own is None:
            raise PaCAError(
                f"The checkpoint was written without {type(self).__name__}, so it holds another training. To start "
                "from its weights, call module.load_state_dict(checkpoint['state_dict']) and fit without ckpt_path."
            )
        assert self._adapted is not None
        check_settings(self._adapted, own["settings"], "The checkpoint")
        if not self.full_checkpoints:  # otherwise the base comes from the checkpoint
            check_same_base(self._adapted.base, own.get("base", {}), "The checkpoint")
        self._resumed.note_saved(own)

    def _check_optimizers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = trained_parameters(pl_module)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        covered = {id(parameter) for group in groups for parameter in group["params"]}
        if missed := [name for name, parameter in trained.items() if id(parameter) not in covered]:
            raise PaCAError(
                f"{len(missed)} of {len(trained)} trained parameters are in no optimizer ({missed[0]!r} is one). Build "
                "the optimizer in configure_optimizers from [p for p in self.parameters() if p.requires_grad]. "
                "LightningCLI's --optimizer is built too early: use auto_configure_optimizers=False and take "
                "optimizer: OptimizerCallable."
            )
        self._resumed.check_optimizers(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the optimizer's settings, before those of a checkpoint replace them."""
        check_validation_interval(trainer)
        self._resumed.note_configured(trainer)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary, now that a checkpoint is restored."""
        self._print_report(trainer, pl_module)

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the names of monitored metrics."""
        check_monitors(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary, and note where training begins."""
        self._print_report(trainer, pl_module)
        check_validation_comes(trainer)
        self._at_start = (trainer.global_step, tensor_sums(trained_parameters(pl_module).values()))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that something was trained, and the last steps."""
        super().on_train_end(trainer, pl_module)
        if self._at_start is not None and trainer.global_step > self._at_start[0]:
            trained = list(trained_parameters(pl_module).values())
            check_moved(trainer, trained, self._at_start[1], kind="trained parameter")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the method's settings, the base model and the optimizers."""
        adapted = adapted_model(pl_module)
        assert adapted is not None
        own = {"settings": adapted.settings, "base": adapted.base, **saved_optimizers(trainer)}
        checkpoint["callbacks"][self.state_key] = own

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove our hooks; the model stays adapted."""
        self._remove_hooks()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove our hooks after an error, when there is no teardown."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._hooks.remove()
        self._forget_steps()
        self._resumed.forget()
        self._at_start = None

    def _print_report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the learning rate of a resumed run, and print the summary with it, once a run."""
        assert self.report is not None
        if trainer.state.fn == TrainerFn.FITTING and self._resumed.settle(trainer):
            trained = trained_parameters(pl_module).values()
            self.report.learning_rate = learning_rate(trainer, "initial_lr", trained)
            rank_zero_only(rich.print)(self.report)
