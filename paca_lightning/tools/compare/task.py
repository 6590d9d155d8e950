"""What is compared: the run of a config, as plain settings that a trial changes in a few places."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.errors import PaCAError
from paca_lightning.tools.memory.from_config import SettingsCLI
from paca_lightning.tools.run_config import lightning_cli
from paca_lightning.tools.run_parser import RunParser

Settings = dict[str, Any]
Key = tuple[str, ...]
LEARNING_RATES = ("lr", "learning_rate")
PACA = "PaCAStrategy"
METHODS = (PACA, "BottleneckStrategy", "LoReFTStrategy", "PEFTStrategy", "ProjectedGradients")
"""Callbacks that say how a run fine-tunes."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run to compare methods on.

    Attributes:
        name: Of its config.
        settings: Everything that ``fit`` would be told, as YAML has it.
        lr_key: Where the learning rate is in the settings.
        seed_keys: Where the seeds are that differ between the runs of a method.
        module: The module, whose model lies on the meta device.
        data: The data module, without data.
        paca: What the config's PaCAStrategy says; the defaults without one.
    """

    name: str
    settings: Settings
    lr_key: Key
    seed_keys: tuple[Key, ...]
    module: LightningModule
    data: LightningDataModule
    paca: PaCAConfig

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model inside the module, on the meta device; the module itself if it has none."""
        inside = (child for child in self.module.modules() if hasattr(child, "get_input_embeddings"))
        return next(inside, self.module)


def read_task(arguments: Sequence[str], name: str, lr_key: str | None, prog: str) -> Task:
    """The task that the arguments of ``fit`` describe.

    Args:
        arguments: ``--config FILE``, and what overrides it.
        name: Of the task, in messages and directories.
        lr_key: Where its learning rate is, with dots. Default: the only number named ``lr`` or ``learning_rate`` among
            the module's settings.
        prog: The command, for messages.

    Raises:
        PaCAError: If the config cannot be read, resumes a run, or has no learning rate or several.
    """
    cli = lightning_cli(list(arguments), run=False, cli_class=SettingsCLI, prog=prog)
    assert isinstance(cli.parser, RunParser)
    if (resumed := cli.parser.left_out.get("ckpt_path")) is not None:
        raise PaCAError(
            f"{name}: the config resumes a run (ckpt_path: {resumed}), which has its learning rate. Set ckpt_path to "
            "null in it."
        )
    settings: Settings = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
    callbacks = settings["trainer"]["callbacks"] or []
    callbacks = settings["trainer"]["callbacks"] = callbacks if isinstance(callbacks, list) else [callbacks]
    with torch.device("meta"):
        cli.model.configure_model()
    paca = [entry for entry in callbacks if short_name(entry) == PACA]
    if paca and paca[0]["init_args"].get("adapter"):
        raise PaCAError(
            f"{name}: PaCAStrategy starts from a trained adapter. Methods are compared from the base model."
        )
    return Task(
        name=name,
        settings=settings,
        lr_key=tuple(lr_key.split(".")) if lr_key else find_learning_rate(settings, name),
        seed_keys=seed_keys(settings),
        module=cli.model.to("meta"),
        data=cli.datamodule,
        paca=PaCAConfig.from_dict((paca[0]["init_args"].get("config") if paca else None) or {}),
    )


def short_name(entry: Settings) -> str:
    """Name of the class of a callback in a config, without its module."""
    return str(entry["class_path"]).rpartition(".")[2]


def find_learning_rate(settings: Settings, name: str) -> Key:
    """Where the learning rate is among the module's settings.

    Raises:
        PaCAError: If there is none, or there are several.
    """
    found = list(_numbers(settings["model"], ("model",)))
    if len(found) != 1:
        names = ", ".join(".".join(key) for key in found) or "none"
        raise PaCAError(
            f"{name}: the learning rate to search must be one number named lr or learning_rate among the settings of "
            f"the module. Found: {names}. Say where it is with --lr-key, such as --lr-key model.init_args.lr."
        )
    return found[0]


def _numbers(node: Any, key: Key) -> Iterator[Key]:
    for name, value in node.items() if isinstance(node, dict) else ():
        if name in LEARNING_RATES and isinstance(value, int | float):
            yield (*key, name)
        else:
            yield from _numbers(value, (*key, name))


def seed_keys(settings: Settings) -> tuple[Key, ...]:
    """Where the seeds are that may change without changing the data that are validated on."""
    data = (settings.get("data") or {}).get("init_args") or {}
    draws_validation = data.get("validation_fraction") or data.get("limit") is not None
    own = (("data", "init_args", "seed"),) if "seed" in data and not draws_validation else ()
    return (("seed_everything",), *own)


def replaced(settings: Settings, key: Key, value: Any) -> Settings:
    """Settings with another value at a place.

    Raises:
        PaCAError: If there is no such place.
    """
    name, *rest = key
    if name not in settings or (rest and not isinstance(settings[name], dict)):
        raise PaCAError(f"The config has no setting {'.'.join(key)!r} where the learning rate should be (--lr-key).")
    return settings | {name: replaced(settings[name], tuple(rest), value) if rest else value}
