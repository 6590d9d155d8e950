"""The run that made a history: its module with the base model, and its data module."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from paca_lightning.callbacks.adapter_method import AdapterMethodStrategy
from paca_lightning.callbacks.loreft_strategy import LoReFTStrategy
from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.causal_lm import CausalLMModule
from paca_lightning.tasks.data.new_tokens import give_new_tokens
from paca_lightning.tasks.instruction import InstructionDataModule
from paca_lightning.tools.dynamics.options import PROG
from paca_lightning.tools.run_config import lightning_cli
from paca_lightning.tools.run_version import CONFIG_NAME

KEPT = ("seed_everything", "model", "data")
"""What of a config says how model and data are built."""
KEPT_OF_TRAINER = ("accelerator", "precision")
"""What of its trainer changes a loss."""
METHODS = ("BottleneckStrategy", "LoReFTStrategy", "PEFTStrategy")
"""Callbacks that say what adapters are of. All others would train, save and print."""
MEASURING = {"devices": 1, "logger": False, "enable_checkpointing": False}


def read_run(config: Path, overrides: list[str]) -> tuple[CausalLMModule, InstructionDataModule, Trainer]:
    """Build what a run was made of. The model is not built yet.

    Args:
        config: Of the run, as ``fit`` took or saved it.
        overrides: Further options of ``fit``.

    Returns:
        The module, the data module, and a trainer on one device of the run's accelerator and precision.

    Raises:
        PaCAError: If the config cannot be used, or the run has a module, data or a method that is not measured.
    """
    try:
        settings: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PaCAError(f"{config} cannot be read: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("trainer") or {}, dict):
        raise PaCAError(f"{config} is no config of a run.")
    trainer = settings.get("trainer") or {}
    kept = {name: settings[name] for name in KEPT if name in settings}
    kept["trainer"] = {name: trainer[name] for name in KEPT_OF_TRAINER if name in trainer} | MEASURING
    kept["trainer"]["callbacks"] = [one for one in trainer.get("callbacks") or [] if _class_name(one) in METHODS]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(kept, file)
        file.flush()
        cli = lightning_cli([f"--config={file.name}", *overrides], run=False, prog=PROG)
    for given, wanted in ((cli.model, CausalLMModule), (cli.datamodule, InstructionDataModule)):
        if not isinstance(given, wanted):
            raise PaCAError(
                f"dynamics measures runs with a {wanted.__name__}, whose rows can be recited, and {config} has a "
                f"{type(given).__name__}. Of other runs, each point.json holds the losses, and `validate` takes a "
                "point as the adapter of the strategy's callback."
            )
    if isinstance(method_of(cli.trainer), LoReFTStrategy):
        raise PaCAError(
            "dynamics cannot measure LoReFT: it edits the tokens of a prompt, and here prompt and answer go through "
            "the model together. Each point.json holds the losses, and `validate` takes a point: "
            "LoReFTStrategy(adapter=...)."
        )
    give_new_tokens(cli.datamodule, cli.model.new_tokens)
    return cli.model, cli.datamodule, cli.trainer


def method_of(trainer: Trainer) -> AdapterMethodStrategy | None:
    """What a run trains adapters by; None if it is PaCA, whose adapters tell all that is needed."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, AdapterMethodStrategy)), None)


def _class_name(callback: Any) -> str:
    return str(callback.get("class_path")).rpartition(".")[2] if isinstance(callback, dict) else ""


def config_beside(history: Path, given: str | None) -> Path:
    """The config of the run that wrote a history.

    Args:
        history: The history.
        given: What the user gave, if anything.

    Raises:
        PaCAError: If there is none.
    """
    path = Path(given) if given is not None else history.absolute().parent / CONFIG_NAME
    if not path.is_file():
        hint = "Correct --config" if given is not None else "Give the run's config: --config FILE"
        raise PaCAError(f"There is no {str(path)!r}, which says which model and data the run had. {hint}.")
    return path
