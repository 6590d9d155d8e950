"""A run to trace, read from a LightningCLI config."""

import atexit
import tempfile
import warnings
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from paca_lightning.callbacks.paca import PaCAStrategy
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.strategies.diloco.strategy import DiLoCoStrategy
from paca_lightning.strategies.fsdp2.strategy import FSDP2Strategy
from paca_lightning.tasks.classifier import ClassifierModule
from paca_lightning.tasks.embedding import EmbeddingModule
from paca_lightning.tasks.preference import PreferenceModule
from paca_lightning.tools.memory.baselines import FULL, PACA
from paca_lightning.tools.memory.traced_run import TracedRun
from paca_lightning.tools.presets import preset_config
from paca_lightning.tools.run_config import lightning_cli

ESTIMATED = (SingleDeviceStrategy, DDPStrategy)
NOT_ESTIMATED = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)
"""Subclasses of :data:`ESTIMATED` that hold the model in other ways."""


class SettingsCLI(LightningCLI):
    """LightningCLI that builds no trainer: its settings may name devices that this machine lacks."""

    def instantiate_trainer(self, **_: Any) -> Any:
        """The trainer's settings."""
        return self.config_init.get("trainer")


def read_config(arguments: list[str], preset: str | None = None) -> tuple[LightningModule, LightningDataModule, Any]:
    """The module, the data module and the trainer's settings of a config, without loading weights or data.

    Args:
        arguments: As for ``fit``: ``--config FILE``, and what overrides it.
        preset: A known shape in place of the module's ``model``.

    Raises:
        PaCAError: If there is no such preset.
    """
    if preset is not None:
        directory = tempfile.TemporaryDirectory(prefix="paca-preset-")
        atexit.register(directory.cleanup)  # the module reads it when it is built
        preset_config(preset).save_pretrained(directory.name)
        arguments = [*arguments, "--model.init_args.model", directory.name]
    cli = lightning_cli(arguments, run=False, cli_class=SettingsCLI, prog="paca-lightning estimate")
    return cli.model, cli.datamodule, cli.trainer


TWO_LABELS = ["0", "1"]
"""Stand for labels that the data would tell: their number hardly matters beside the model."""


def run_to_trace(
    module: LightningModule, datamodule: Any, trainer: Any, tokens: int | None = None, batch: int | None = None
) -> tuple[TracedRun, PaCAConfig | None]:
    """The run that a config describes, as :func:`read_config` read it.

    Args:
        module: Makes its model in ``configure_model``.
        datamodule: Its hyperparameters ``max_length`` and ``batch_size`` give the shape of a batch.
        trainer: The trainer's settings.
        tokens: Length of a sequence. Default: the data module's ``max_length``.
        batch: Sequences of a micro-batch. Default: the data module's ``batch_size``.

    Returns:
        The run, and the PaCA configuration if it has one.

    Raises:
        PaCAError: If the run cannot be traced, or the shape of a batch or the number of devices is not given.
    """
    if not is_overridden("configure_model", module):
        raise PaCAError(
            f"{type(module).__name__} does not build its model in configure_model, so it cannot be built without its "
            "weights. Move the building there, or use CausalLMModule."
        )
    data = dict(getattr(datamodule, "hparams", {}))
    tokens, batch = tokens or data.get("max_length"), batch or data.get("batch_size")
    if tokens is None or batch is None:
        raise PaCAError(
            f"{type(datamodule).__name__} does not say how long its sequences are. Give --tokens and --batch."
        )
    if isinstance(module, ClassifierModule):
        module.take_settings(data.get("task"), data.get("labels") or TWO_LABELS, pad_token_id=0)
    if isinstance(module, PreferenceModule):
        module.reference.context = nullcontext  # its forward needs as much, whichever weights it has
    configs = [callback.config for callback in trainer.callbacks or [] if isinstance(callback, PaCAStrategy)]
    config = configs[0] if configs else None
    ranks = _count_devices(trainer.devices) * trainer.num_nodes
    strategy, gradient_buckets = known_strategy(trainer.strategy, ranks)
    run = TracedRun(
        module=module,
        convert=(PACA if config else FULL).converter(config),
        strategy=strategy,
        ranks=ranks if strategy else 1,
        shard_size=strategy.shard_size if strategy else None,
        gradient_buckets=gradient_buckets,
        precision=str(trainer.precision or "32-true"),
        batch_size=batch,
        tokens=tokens,
        packed=bool(data.get("packing")),
        texts=_count_texts(data) if isinstance(module, EmbeddingModule) else 1,
        accumulate=trainer.accumulate_grad_batches,
        accelerator=trainer.accelerator != "cpu",
    )
    return run, config


def _count_texts(data: dict[str, Any]) -> int:
    """Texts in a row of a data module for embeddings."""
    if (columns := data.get("columns")) is None:
        warnings.warn(
            "Rows are estimated with an anchor and a positive, as no data are read. If they have a negative, too: "
            "--data.init_args.columns '[anchor, positive, negative]'.",
            stacklevel=3,
        )
    return len(columns or ("anchor", "positive"))


def _count_devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    try:
        number = int(devices)
    except ValueError:
        number = -1
    if number < 1:
        raise PaCAError(f"devices={devices!r} depends on the machine. Give a number: --trainer.devices 8.")
    return number


def known_strategy(strategy: Any, ranks: int) -> tuple[FSDP2Strategy | None, bool]:
    """How a trainer's strategy holds the model on each device.

    Args:
        strategy: An object, or a registered name.
        ranks: How many devices there are.

    Returns:
        The strategy that shards the model, if it is sharded; and whether gradients are exchanged through copies.

    Raises:
        PaCAError: If the strategy is another than these, or its shards do not divide the ranks.
    """
    kind = _class_of(strategy)
    if issubclass(kind, FSDP2Strategy):
        strategy = strategy if isinstance(strategy, FSDP2Strategy) else FSDP2Strategy()
        size = strategy.shard_size or ranks
        if ranks % size:
            raise PaCAError(f"shard_size={size} does not divide {ranks} ranks.")
        return strategy, False
    if issubclass(kind, ESTIMATED) and not issubclass(kind, NOT_ESTIMATED):
        return None, ranks > 1
    if issubclass(kind, DiLoCoStrategy):
        return None, False  # as on one device; the momentum of the outer loop, one more copy of the deltas, is left out
    name = strategy if isinstance(strategy, str) else kind.__name__
    raise PaCAError(f"strategy={name!r} is not estimated. Use auto, ddp, paca_fsdp2 or paca_diloco.")


def _class_of(strategy: Any) -> type:
    """The class of a strategy given as an object, or by its name; object if the name is unknown."""
    if strategy == "auto":
        return SingleDeviceStrategy
    if isinstance(strategy, str):
        known = StrategyRegistry[strategy]["strategy"] if strategy in StrategyRegistry else None
        return known if isinstance(known, type) else object
    return type(strategy)
