"""What PaCAStrategy checks of a run before it trains."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TransformerEnginePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from paca_lightning.conversion.write_back import layers_stepped_by
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable_if_local
from paca_lightning.layers.base import paca_layers


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


def check_outputs(trainer: Trainer) -> None:
    """Refuse output directories that cannot be written.

    Raises:
        PaCAError: If there is one.
    """
    if trainer.checkpoint_callbacks or trainer.loggers:
        check_writable_if_local(trainer.default_root_dir, "default_root_dir")
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            check_writable_if_local(callback.dirpath, "ModelCheckpoint(dirpath=...)")


def check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse optimizers that leave a delta out.

    Raises:
        PaCAError: If so.
    """
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


def learning_rate(trainer: Trainer, name: str) -> float | None:
    """The largest learning rate of a delta; None if its optimizer has none. Other parameters may have another one.

    Args:
        trainer: With optimizers.
        name: ``lr``, or ``initial_lr`` for the one before a schedule scales it.
    """
    deltas = {id(layer.paca_delta) for _, layer in paca_layers(trainer.lightning_module)}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [group.get(name, group["lr"]) for group in groups if deltas & {id(p) for p in group["params"]}]
    return max((float(rate) for rate in rates if rate is not None), default=None)  # Adafactor may choose its own
