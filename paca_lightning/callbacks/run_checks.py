"""What PaCAStrategy checks of a run before and after it trains."""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning
from lightning.pytorch.plugins import TransformerEnginePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, StrategyRegistry
from torch import Tensor

from paca_lightning.callbacks.training_counts import WITHOUT_DOUBLES
from paca_lightning.conversion.along_rates import along_parameters
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.conversion.state import conversion_of
from paca_lightning.conversion.write_back import layers_stepped_by, rows_stepped_by
from paca_lightning.core.dtensor import local
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable_if_local
from paca_lightning.core.private.lightning import pruned_modules
from paca_lightning.layers.base import paca_layers
from paca_lightning.layers.rows import row_modules
from paca_lightning.strategies.checkpoint_io import LocalCheckpointIO


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies and precisions under which columns would not be trained.

    Raises:
        PaCAError: If the run's is one.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        reason = (
            "FSDP1 flattens parameters of one dtype, and a delta is fp32 beside a narrower weight"
            if isinstance(trainer.strategy, FSDPStrategy)
            else "DeepSpeed steps the optimizer past the hooks that write the columns back"
        )
        raise PaCAError(f"{type(trainer.strategy).__name__} cannot train PaCA: {reason}. Use strategy='paca_fsdp2'.")
    if isinstance(trainer.precision_plugin, TransformerEnginePrecision):
        raise PaCAError(
            "precision='transformer-engine' replaces the layers that PaCA trains. Use bf16-true or bf16-mixed."
        )


def prepare_files(trainer: Trainer, stage: str) -> None:
    """Guard the checkpoints, and refuse output directories that cannot be written.

    Raises:
        PaCAError: If there is one.
    """
    guard_checkpoints(trainer)
    if stage != "fit":
        return
    if trainer.checkpoint_callbacks or trainer.loggers:
        check_writable_if_local(trainer.default_root_dir, "default_root_dir")
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            check_writable_if_local(callback.dirpath, "ModelCheckpoint(dirpath=...)")


def guard_checkpoints(trainer: Trainer) -> None:
    """Let checkpoint files appear whole, and be checked when they are read.

    A ``CheckpointIO`` that the user has chosen stays.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = LocalCheckpointIO()


def check_trained_layers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse optimizers that leave a delta out, and callbacks that would replace or thaw the weights of PaCA layers.

    Raises:
        PaCAError: If there is one.
    """
    _check_optimizers(trainer, pl_module)
    _check_callbacks(trainer, pl_module)


def _check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    covered = {path for optimizer in trainer.optimizers for path in layers_stepped_by(optimizer, pl_module)}
    everything = {path for path, _ in paca_layers(pl_module)}
    if not everything:
        raise PaCAError("The converted layers are gone: something replaced them after PaCAStrategy had converted them.")
    if missed := sorted(everything - covered):
        raise PaCAError(
            f"{len(missed)} of {len(everything)} PaCA layers are in no optimizer ({missed[0]!r} is one), so they would "
            "not be trained. Build the optimizer in configure_optimizers from [p for p in self.parameters() if "
            "p.requires_grad]. LightningCLI's --optimizer is built too early: use auto_configure_optimizers=False and "
            "take optimizer: OptimizerCallable. List layers that must not train in exclude_modules."
        )
    stepped = {path for optimizer in trainer.optimizers for path in rows_stepped_by(optimizer, pl_module)}
    if left := [path for path, _ in row_modules(pl_module) if path not in stepped]:
        raise PaCAError(f"The rows of new tokens in {left[0]!r} are in no optimizer, so they would not be trained.")


def _check_callbacks(trainer: Trainer, pl_module: LightningModule) -> None:
    layers = {layer: path for path, layer in paca_layers(pl_module)}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            pruned = [layers[module] for module in pruned_modules(callback) if module in layers]
            if pruned:
                raise PaCAError(
                    f"{type(callback).__name__} would put a mask on {pruned[0]!r} ({len(pruned)} such layers), whose "
                    "columns PaCA writes into its weight: they would be lost. Prune the model before, or pass "
                    "parameters_to_prune without the layers that PaCA trains."
                )
        if isinstance(callback, BackboneFinetuning):
            thawed = [path for path, _ in paca_layers(pl_module.get_submodule("backbone"))]
            if thawed:
                raise PaCAError(
                    f"{type(callback).__name__} thaws every weight of `backbone`, in which PaCA trains columns of "
                    f"'backbone.{thawed[0]}' ({len(thawed)} such layers) and keeps frozen. Leave the callback out, "
                    "or leave the backbone to it: PaCAConfig(exclude_modules=[...])."
                )


def check_validation_interval(trainer: Trainer) -> None:
    """Compare ``val_check_interval`` with the number of batches, before a sanity check that may take long.

    Raises:
        PaCAError: If an epoch is shorter.
    """
    # A resumed run asks later: the loaders are made now, and Lightning has yet to restore their state.
    if isinstance(trainer.val_check_interval, int) and trainer.ckpt_path is None:
        try:
            _ = trainer.estimated_stepping_batches
        except ValueError as error:
            raise PaCAError(str(error).strip()) from error


def deltas_of(pl_module: LightningModule) -> list[Tensor]:
    """The deltas of a module."""
    return [layer.paca_delta for _, layer in paca_layers(pl_module)]


def tensor_sums(tensors: Iterable[Tensor]) -> list[tuple[float, float]]:
    """Sum and sum of squares of each tensor, of this rank's rows: any change of a tensor changes them."""
    sums = []
    for tensor in tensors:
        own = local(tensor.detach())
        wide = own.to(torch.float32 if own.device.type in WITHOUT_DOUBLES else torch.float64)
        sums.append(torch.stack([wide.sum(), wide.square().sum()]).cpu())
    return [(float(total), float(squares)) for total, squares in sums]


def check_moved(
    trainer: Trainer, tensors: Sequence[Tensor], before: list[tuple[float, float]], *, kind: str = "delta"
) -> None:
    """Refuse to end a run as a success that has trained nothing.

    Args:
        trainer: Of a run that has taken steps.
        tensors: What was to be trained.
        before: :func:`tensor_sums` of them before the first step.
        kind: What the message calls one of them.

    Raises:
        PaCAError: On all ranks, if none of any has moved.
    """
    moved = tensor_sums(tensors) != before
    if not trainer.strategy.reduce_boolean_decision(moved, all=False):
        raise PaCAError(
            f"No {kind} has moved in this run of {trainer.global_step} optimizer steps: nothing was trained, and there "
            f"is no adapter. The learning rate is {learning_rate(trainer, 'initial_lr', tensors)}, at the last "
            f"step {learning_rate(trainer, 'lr', tensors)}. Raise it, see with `paca-lightning data` that "
            "tokens are trained, and with precision 16-mixed, that not every step overflows."
        )


def delta_sums(pl_module: LightningModule) -> list[tuple[float, float]]:
    """The :func:`tensor_sums` of a module's deltas."""
    return tensor_sums(deltas_of(pl_module))


def check_deltas_moved(trainer: Trainer, pl_module: LightningModule, before: list[tuple[float, float]]) -> None:
    """As :func:`check_moved`, of a module's deltas.

    Raises:
        PaCAError: If none has moved.
    """
    check_moved(trainer, deltas_of(pl_module), before)


def learning_rate(trainer: Trainer, name: str, tensors: Iterable[Tensor] | None = None) -> float | None:
    """The largest learning rate of some tensors; None if their optimizer has none. Others may have another one.

    Args:
        trainer: With optimizers.
        name: ``lr``, or ``initial_lr`` for the one before a schedule scales it.
        tensors: What is trained. Default: the deltas.
    """
    wanted = {id(tensor) for tensor in (deltas_of(trainer.lightning_module) if tensors is None else tensors)}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group.get(name, group["lr"]) for group in groups if wanted & {id(p) for p in group["params"]}]
    return max((float(rate) for rate in rates if rate is not None), default=None)  # Adafactor may choose its own


def known_at_start(report: ConversionReport, trainer: Trainer) -> ConversionReport:
    """A report with what the start of a run adds: learning rates, whether an Adam takes them, restored columns."""
    report.learning_rate = learning_rate(trainer, "initial_lr")
    report.along_rate = learning_rate(trainer, "initial_lr", along_parameters(trainer.lightning_module))
    report.adam = all("adam" in type(optimizer).__name__.lower() for optimizer in trainer.optimizers)
    conversion = conversion_of(trainer.lightning_module)
    if conversion is not None and conversion.columns_restored:
        report.by_data = 0
    return report


def refuse_as_strategy(**_: Any) -> NoReturn:
    """Say that PaCAStrategy is no strategy of Lightning.

    Raises:
        PaCAError: Always.
    """
    raise PaCAError(
        "PaCAStrategy is a callback, not a Lightning strategy. Pass Trainer(callbacks=[PaCAStrategy()]); strategy= "
        "says how a run is distributed: 'auto', 'ddp', 'paca_fsdp2', ..."
    )


# The name suggests Trainer(strategy="PaCAStrategy"): the registered factory explains where it belongs.
StrategyRegistry.register(
    "pacastrategy", refuse_as_strategy, description="A callback: explains where PaCAStrategy goes."
)
